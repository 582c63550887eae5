"""Group G: the text encoder, on padded batches with a mask and on single prompts without padding."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from parity_case import Case
from parity_maths import Results

from worldmodel.models.wan.text import TextEncoder, relative_buckets

MOST_BF16 = 0.01  # relative L2 distance of the bfloat16 form; measured 0.0071


def encode(case: Case) -> Results:
    x, path = case.tensors, case.folder / case.weight_files[case.settings["weights"]]
    encoder = TextEncoder(path, dtype=torch.float32)
    hidden = encoder.hidden([x["ids"]], [x["mask"]])[0]
    coarse = TextEncoder(path, dtype=torch.bfloat16).hidden([x["ids"]], [x["mask"]])[0].float()
    distance = ((coarse - x["hidden"]).norm() / x["hidden"].norm()).item()
    assert distance < MOST_BF16, f"the bfloat16 form is {distance:.4f} away"
    prompts = encoder.embed([row[mask.bool()].tolist() for row, mask in zip(x["ids"], x["mask"], strict=True)])
    padded = [F.pad(prompt, (0, 0, 0, x["ids"].shape[1] - len(prompt))) for prompt in prompts]
    return {"hidden": hidden, "prompt_embeds": torch.stack(padded), "rel_bucket": relative_buckets(x["rel_pos"])}
