"""The plain way to tune a model with LoRA: transformers and peft, the whole model in one process.

One JSON line for each step on standard output, its loss and seconds; last the peak of resident memory.
Reads rows as ids, (step, row, token), from a file, and the model from a GGUF through transformers' reader.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("rows", type=Path)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rate", type=float, default=5e-4)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    base = AutoModelForCausalLM.from_pretrained(
        chosen.model.parent, gguf_file=chosen.model.name, dtype=torch.float32
    )
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(base, config)
    model.train()
    optimiser = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=chosen.rate, weight_decay=0.0
    )
    for batch in json.loads(chosen.rows.read_text()):
        began = time.monotonic()
        ids = torch.tensor(batch)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        print(json.dumps({"loss": loss.item(), "seconds": time.monotonic() - began}), flush=True)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    print(json.dumps({"peak_bytes": int(status["VmHWM"].split()[0]) * 1024}), flush=True)


if __name__ == "__main__":
    main()
