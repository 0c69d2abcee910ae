"""What a model makes: text, code, image, audio or video, and whether it is a diffusion model."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

Table = tuple[tuple[str, tuple[str, ...]], ...]

MODALITIES = ("text", "code", "image", "audio", "video")

#: Parts of class names, model types and architectures, lower case; the first that is found decides.
DIFFUSION_WORDS: Table = (
    ("video", ("wantransformer", "wanpipeline", "hunyuanvideo", "ltxvideo", "ltxpipeline", "cogvideo", "mochi",
               "latte", "allegro", "cosmos", "spatiotemporal", "animatediff", "unet3d", "unetmotion")),
    ("audio", ("stableaudio", "audioldm", "musicldm", "acestep", "dancediffusion", "unet1d")),
    ("image", ("flux", "sd3", "stablediffusion", "stable-diffusion", "pixart", "sanatransformer", "auraflow",
               "luminanext", "lumina2", "hunyuandit", "hidream", "qwenimage", "kandinsky", "chromatransformer", "uvit",
               "unet", "dittransformer", "transformer2d", "ddpm", "diffusion")),
)  # fmt: skip
OTHER_WORDS: Table = (
    ("audio", ("whisper", "wav2vec", "hubert", "encodec", "bark", "speech", "musicgen", "vits", "seamless", "silero")),
    ("video", ("videomae", "vivit", "timesformer", "xclip")),
    ("image", ("vit", "swin", "convnext", "resnet", "deit", "dinov", "beit", "segformer", "siglip", "clipvision")),
    ("code", ("starcoder", "codegen", "codellama", "codet5", "codebert", "santacoder", "gpt_bigcode", "gptbigcode")),
)
#: Names that only the denoisers of diffusion models have, by modality.
DIFFUSION_TENSORS: Table = (
    ("video", ("temporal_transformer", "motion_modules", "temp_attentions")),
    ("image", ("double_blocks.", "joint_blocks.", "single_transformer_blocks.", "time_embedding.linear_1",
               "t_embedder.", "time_embed.0.", "time_text_embed.", "down_blocks.", "diffusion_model.")),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Modality:
    """The answer, and where it was found: see `find_modality`; `default` when nothing tells."""

    name: str
    is_diffusion: bool
    found_in: str


def find_modality(
    stated: Mapping[str, Any],
    config: Mapping[str, Any],
    header: Mapping[str, str],
    tensors: Iterable[str],
    pipeline: Mapping[str, Any] | None = None,
) -> Modality:
    """From metadata.json, else the model's config, else the safetensors header, else the tensors' names.

    `pipeline` is the model_index.json beside the folder of a denoiser. Such a model is a diffusion
    model, and one of images unless a name says otherwise.
    """
    guesses = [
        ("config.json", _from_words(_config_words(config))),
        ("model_index.json", _from_words(_config_words(pipeline or {}))),
        ("header", _from_words([header.get("modelspec.architecture", ""), header.get("ss_base_model_version", "")])),
        ("tensor names", _from_tensors(tensors)),
        ("default", ("text", False)),
    ]
    if pipeline is not None:
        guesses = [(where, found) for where, found in guesses if found and found[1]]
        guesses.append(("model_index.json", ("image", True)))
    where, (modality, is_diffusion) = next((where, found) for where, found in guesses if found)
    if stated.get("modality") in MODALITIES:
        diffusion = stated.get("is_diffusion_model", is_diffusion)
        return Modality(str(stated["modality"]), bool(diffusion), "metadata.json")
    return Modality(modality, is_diffusion, where)


def _config_words(config: Mapping[str, Any]) -> list[str]:
    architectures = config.get("architectures")
    values = [config.get("_class_name"), config.get("model_type")]
    values += architectures if isinstance(architectures, list) else []
    return [value for value in values if isinstance(value, str)]


def _from_words(words: Iterable[str]) -> tuple[str, bool] | None:
    text = " ".join(words).lower()
    if not text.strip():
        return None
    if "causallm" not in text:
        for modality, parts in DIFFUSION_WORDS:
            if any(part in text for part in parts) or (modality == "image" and "dit" in text.split()):
                return modality, True
    for modality, parts in OTHER_WORDS:
        if any(part in text for part in parts):
            return modality, False
    return "text", False


def _from_tensors(names: Iterable[str]) -> tuple[str, bool] | None:
    listed = "\n".join(names)
    for modality, parts in DIFFUSION_TENSORS:
        if any(part in listed for part in parts):
            return modality, True
    return None
