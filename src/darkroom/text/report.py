"""What a model's text encoders read of a prompt: tokens, weights, chunks, and what they do not read."""

from collections.abc import Sequence
from dataclasses import dataclass

from darkroom.text.chunks import Chunk
from darkroom.text.conditioning import ClassConditioning, Conditioning, NoConditioning
from darkroom.text.encode import Reader, TextPart, check_roles
from darkroom.text.prompt import Part, Prompt, PromptPlan, shown


@dataclass(frozen=True, kw_only=True)
class EncoderReport:
    """What one text encoder reads of one text.

    `role` is the encoder's among the model's. `tokens` counts those of the text, without marks and with what
    is cut; `chunks` are those that it reads, each token as its part of the text and its weight; `room` is how
    many tokens a chunk holds; `cut` is the text that it does not read, and `cut_tokens` how many that are.
    """

    role: str
    tokens: int
    chunks: tuple[tuple[tuple[str, float], ...], ...]
    room: int
    cut: str = ""
    cut_tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class TextReport:
    """One text of a prompt, and what each text encoder reads of it."""

    text: Prompt
    encoders: tuple[EncoderReport, ...]


@dataclass(frozen=True, kw_only=True)
class PromptReport:
    """A prompt as a model reads it; printed as the lines of `lines`.

    `parts` are those joined by AND, each with its texts over the steps; `texts` are what the encoders read.
    `warnings` name what was cut, brackets without their other half, and what else of the prompt may have been
    meant otherwise.
    """

    prompt: Prompt
    parts: tuple[Part, ...]
    texts: tuple[TextReport, ...]
    warnings: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """The report for people: texts with their steps, tokens by encoder and chunk, warnings."""
        out: list[str] = []
        told = {report.text: report for report in self.texts}
        for part in self.parts:
            start = 1
            for piece in part.pieces:
                steps = "" if len(part.pieces) == 1 else f"steps {start} to {piece.until}: "
                weight = "" if len(self.parts) == 1 else f" (weight {part.weight:g})"
                out.append(f"{steps}{_words(piece.text)}{weight}")
                report = told.pop(piece.text, None)  # each text once
                out += [f"  {line}" for line in _encoder_lines(report)]
                start = piece.until + 1
        return out + [f"warning: {warning}" for warning in self.warnings]

    def __str__(self) -> str:
        return "\n".join(self.lines())


def report(plan: PromptPlan, conditioning: Conditioning, parts: Sequence[TextPart]) -> PromptReport:
    """What a model's text encoders, `parts`, read of a prompt's texts.

    Raises InputError for more chunks than there may be, and for a text by role where no encoder has it.
    """
    readers = conditioning.readers(parts)
    check_roles(readers, plan.texts)
    texts = [
        TextReport(text=text, encoders=tuple(_encoder(reader, text, conditioning) for reader in readers))
        for text in plan.texts
    ]
    cuts = [warning for text in texts for warning in _cuts(text)]
    return PromptReport(
        prompt=plan.prompt, parts=plan.parts, texts=tuple(texts), warnings=(*plan.warnings, *cuts)
    )


def _encoder(reader: Reader, text: Prompt, conditioning: Conditioning) -> EncoderReport:
    assert not isinstance(conditioning, ClassConditioning | NoConditioning)  # they have no readers
    reading = reader.read(text, conditioning.emphasis)
    return EncoderReport(
        role=reader.role,
        tokens=reading.count,
        chunks=tuple(tuple((token.text, token.weight) for token in chunk) for chunk in reading.chunks),
        room=max(reader.room, *map(len, reading.chunks)),
        cut=_source(reading.cut),
        cut_tokens=len(reading.cut),
    )


def _source(tokens: Chunk) -> str:
    """The text that tokens stand for."""
    return "".join(token.text for token in tokens).strip()


def _cuts(text: TextReport) -> list[str]:
    """A warning for each encoder that does not read all of a text."""
    alone = len(text.encoders) == 1
    warnings = []
    for encoder in text.encoders:
        if encoder.cut_tokens:
            words = text.text if isinstance(text.text, str) else text.text.text(encoder.role)
            which = "this model" if alone else f"the text encoder {encoder.role}"
            left = encoder.tokens - encoder.cut_tokens
            warnings.append(
                f"the prompt {shown(words)} has {encoder.tokens} tokens: {which} reads {left}, so the last "
                f"{encoder.cut_tokens} are cut: {shown(encoder.cut)}"
            )
    return warnings


def _words(text: Prompt) -> str:
    if isinstance(text, str):
        return repr(text)
    return ", ".join([repr(text.main), *(f"{role}: {own!r}" for role, own in text.own().items())])


def _encoder_lines(text: TextReport | None) -> list[str]:
    out: list[str] = []
    for encoder in () if text is None else text.encoders:
        count = len(encoder.chunks)
        chunks = "" if count == 1 else f" in {count} chunks"
        out.append(f"{encoder.role}: {encoder.tokens} tokens{chunks} of {encoder.room}")
        for chunk in encoder.chunks if count > 1 or _weighted(encoder.chunks[0]) else ():
            out.append(f"  {_chunk(chunk)}")
        if encoder.cut_tokens:
            out.append(f"  cut, {encoder.cut_tokens} tokens: {encoder.cut}")
    return out


def _weighted(chunk: Sequence[tuple[str, float]]) -> bool:
    return any(weight != 1 for _, weight in chunk)


def _chunk(chunk: Sequence[tuple[str, float]]) -> str:
    """A chunk's text, each run of tokens of one weight in brackets with it."""
    runs: list[tuple[str, float]] = []
    for text, weight in chunk:
        if runs and runs[-1][1] == weight:
            text = runs.pop()[0] + text
        runs.append((text, weight))
    texts = (text.strip() if weight == 1 else f"({text.strip()}:{weight:.4g})" for text, weight in runs)
    return f"{len(chunk)}: " + " ".join(texts)
