"""Noising paths, denoisers, schedules, samplers and guidance."""
