"""Turn a GGUF file into a folder vLLM serves: bf16 safetensors, tokenizer, chat template.

A script of its own, run as a child process (``python convert_model.py FILE.gguf FOLDER``), because
torch and transformers take seconds to import and the package itself never imports them here. The
weights come out exactly as the GGUF file holds them once its 4-bit blocks are expanded and rounded
to bfloat16: a real model, slightly coarser than the one its authors published.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def convert(source: Path, folder: Path) -> None:
    """Write ``source`` (a GGUF file) to ``folder`` as a Hugging Face model in bfloat16.

    Raises ValueError when the file carries no chat template, OSError when it cannot be read.
    """
    location = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    tokenizer = AutoTokenizer.from_pretrained(**location)
    if not tokenizer.chat_template:
        raise ValueError(f"{source}: no chat template, chat requests would fail")
    model = AutoModelForCausalLM.from_pretrained(**location, dtype=torch.float32).to(torch.bfloat16)
    # What transformers notes about the GGUF origin would make a reader look for quantised weights.
    model.hf_quantizer = None
    for owner, name in ((model, "quantization_method"), (model.config, "quantization_config")):
        if hasattr(owner, name):
            delattr(owner, name)
    model.config.dtype = torch.bfloat16
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder, safe_serialization=True)


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
