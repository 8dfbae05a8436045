"""What a picture's file says of its making: a request as text values, in the words that other tools read."""

from darkroom.checkpoint.model import Model
from darkroom.config import to_json
from darkroom.images import Parameters
from darkroom.inputs import Pictures
from darkroom.request import Request, starting_image
from darkroom.text.conditioning import Sizes


def parameters_of(request: Request, model: Model, name: str, k: int) -> Parameters:
    """What picture `k` of a request is made with, by the model called `name`."""
    values = {
        "Steps": str(request.steps),
        "Sampler": request.sampler,
        "Schedule type": request.schedule,
        "CFG scale": f"{request.guidance_scale:g}",
        "Seed": str(request.seeds[k]),
        "Size": f"{request.width}x{request.height}",
    }
    values |= {"Model": name} if name else {}
    values |= _beyond_the_prompt(request, model)
    return Parameters(request.prompts[k], request.negative_prompt, values)


def _beyond_the_prompt(request: Request, model: Model) -> dict[str, str]:
    """What else a picture was made with, where it is not as ever; pictures themselves are only named."""
    pictures, refiner = request.pictures, request.refiner
    precision = str(next(model.network.parameters()).dtype).removeprefix("torch.")
    seen = [name for name in ("image", "mask", "control") if getattr(pictures, name) is not None]
    seen += [] if request.image_prompt is None else ["image prompt"]
    rows = (
        ("Denoising strength", f"{request.strength:g}", starting_image(request, model) is not None),
        ("Inputs", " and ".join(seen), bool(seen)),
        ("Noise level", str(pictures.noise_level), pictures.noise_level != Pictures().noise_level),
        ("True CFG scale", f"{request.true_guidance_scale:g}", request.true_guidance_scale != 1),
        ("Sizes", to_json(request.sizes), request.sizes != Sizes()),
        ("Compat", request.compat.name, request.compat.name != "darkroom"),
        ("Latents", "given", request.latents is not None),
        ("Precision", precision, precision != "float32"),
        ("Refiner", refiner.name if refiner else "", refiner is not None),
        ("Refiner switch at", f"{request.refiner_start:g}", refiner is not None),
    )
    return {name: value for name, value, told in rows if told}
