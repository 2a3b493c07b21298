"""How an exported model is opened, for its card: each block of Python runs as it is in the exported folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from stamo_dist.models.openvla.actions import SETTINGS, STATISTICS
from stamo_dist.models.openvla.load import LANGUAGE
from stamo_dist.recipe.schema import Recipe
from stamo_dist.tasks.base import ExportLayout

_PLAIN = "\n\nWithout stamo-dist these libraries need a torchvision that was built for the installed torch, or none."
_TOKENIZER = """\
```python
import torch

from stamo_dist.models.tokenizer import Tokenizer

tokenizer = Tokenizer.from_pretrained(".")  # this folder, or its id on the Hub
frames = torch.zeros(1, {size}, {size}, 3, dtype=torch.uint8)  # RGB
states = tokenizer.encode(frames)  # (1, tokens, dim)
```

Its parts open with transformers and diffusers alone:

```python
from diffusers import AutoencoderKL, SD3Transformer2DModel
from transformers import AutoModel

encoder = AutoModel.from_pretrained(".", subfolder="encoder")
decoder = SD3Transformer2DModel.from_pretrained(".", subfolder="transformer")
vae = AutoencoderKL.from_pretrained(".", subfolder="vae")
```"""
_VAE = """\
```python
from diffusers import AutoencoderKL

vae = AutoencoderKL.from_pretrained(".")  # this folder, or its id on the Hub
```"""
_POLICY = """\
```python
import numpy as np

from stamo_dist.models.policies import load_policy

policy = load_policy(".")  # this folder, or its id on the Hub
frame = np.zeros((224, 224, 3), np.uint8)  # RGB
actions = policy.act({image}, "open the drawer", {options})  # (chunk, {dim})
```

`dataset_statistics.json` turns the policy's numbers into the units of each source, here of {source}."""
_TEXT = """
transformers has no class for the policy as a whole. Its text tokenizer opens without code from elsewhere:

```python
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
```"""
_HF = f"""
transformers has no class for the policy as a whole. Its language model and text tokenizer open without code from
elsewhere:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(".", subfolder="{LANGUAGE}")
tokenizer = AutoTokenizer.from_pretrained(".")
```"""
_OFFICIAL = """
The layout is that of openvla-7b and OpenVLA-OFT, whose code transformers fetches from `openvla/openvla-7b` and runs
(`trust_remote_code=True`); it asks for the versions that OpenVLA names:

```
from transformers import AutoModelForVision2Seq, AutoProcessor

processor = AutoProcessor.from_pretrained(".", trust_remote_code=True)
model = AutoModelForVision2Seq.from_pretrained(".", trust_remote_code=True)
```

A world head beside it is not read there."""
_PICKLED = """
All weights are safetensors, except {files}: OFT's code opens these by their names, with `torch.load`. They hold tensors
alone (`weights_only=True` reads them); `stamo export --format hf` writes safetensors in their place."""
_PEFT = """
These are PEFT's adapters and what else was trained; the base is fetched from where `adapter_config.json` says."""


def usage(recipe: Recipe, layout: ExportLayout, folder: Path) -> str:
    """The card's section on opening the model that was written to `folder`."""
    if recipe.stage == "tokenizer":
        return _TOKENIZER.format(size=recipe.data.image_size) + _PLAIN
    if recipe.stage == "vae":
        return _VAE + _PLAIN
    about: dict[str, Any] = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
    sources = json.loads((folder / STATISTICS).read_text(encoding="utf-8"))
    text = _acting(about, next((name for name in sources if "action" in sources[name]), None))
    if layout.form == "peft":
        return text + "\n" + _PEFT
    if recipe.policy.diffusion is not None:
        return text + "\n" + _TEXT
    pickled = sorted(file.name for file in folder.glob("*.pt"))
    files = _PICKLED.format(files=", ".join(f"`{name}`" for name in pickled)) if pickled else ""
    if layout.form == "hf":
        return text + "\n" + _HF + _PLAIN + files
    return text + "\n" + _OFFICIAL + "\n" + files


def _acting(about: dict[str, Any], source: str | None) -> str:
    settings, sizes = about["policy"], about["sizes"]
    options = f"unnorm_key={source!r}"
    if settings["proprio"]:
        options += f", proprio=np.zeros({sizes['proprio_dim']})"
    image = "frame" if settings["views"] == 1 else f"[frame] * {settings['views']}"
    return _POLICY.format(image=image, options=options, dim=sizes["action_dim"], source=f"`{source}`")
