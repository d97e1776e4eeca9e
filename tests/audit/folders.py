"""Record folders of our own making: a script, its logs and its claims, honest unless a test makes them otherwise."""

import json
from pathlib import Path
from typing import Any

SCRIPT = '''"""A tiny script in the challenge's style."""
import os
from pathlib import Path

LIMIT = 16_000_000


def main():
    code = Path(__file__).read_text(encoding="utf-8")
    blob = Path("model.ptz").read_bytes()
    total = len(blob) + len(code.encode("utf-8"))
    assert total <= LIMIT
    print(f"Total submission size: {total} bytes")


if __name__ == "__main__":
    main()
'''
SCORES = {1337: 1.1180, 42: 1.1184, 2025: 1.1176}
MODEL = 15_500_000
NATS = 1.6890  # nats per token for one bit per byte


def log(seed: int, score: float, code: int, **other: Any) -> str:
    """A log in the challenge's style; other: train_ms, step_ms, steps, eval_ms, model, total, head, tail."""
    evaluated = other.get("eval_ms", 290_000)
    steps, step = other.get("steps", 6000), other.get("step_ms", 99.9)
    train, model = other.get("train_ms", steps * step), other.get("model", MODEL)
    rows = [
        *other.get("head", []),
        f"seed:{seed}",
        "train_batch_tokens:524288 train_seq_len:2048 iterations:20000",
        f"step:0/20000 val_loss:{6.9 * NATS / 1.68:.4f} val_bpb:{6.9 / 1.68:.4f} train_time:0ms step_avg:0.02ms",
        f"step:3000/20000 train_loss:2.1500 train_time:{train / 2:.0f}ms step_avg:{step:.2f}ms",
        f"step:{steps}/20000 val_loss:{1.14 * NATS:.4f} val_bpb:1.1400 train_time:{train:.0f}ms step_avg:{step:.2f}ms",
        *other.get("after", []),
        "Serialized model: 67224983 bytes",
        f"Code size: {code} bytes",
        f"Total submission size: {67224983 + code} bytes",
        f"Serialized model int6+lzma: {model} bytes",
        f"Total submission size int6+lzma: {other.get('total', model + code)} bytes",
        *other.get("tail", []),
        f"final_int6_sliding val_loss:{score * NATS:.4f} val_bpb:{score:.4f} eval_time:{evaluated}ms",
        f"final_int6_sliding_exact val_loss:{score * NATS:.8f} val_bpb:{score:.8f}",
    ]
    return "\n".join(rows) + "\n"


def record(folder: Path, script: str = SCRIPT, claims: dict[str, Any] | None = None, **other: Any) -> Path:
    """A whole record folder; claims: over the honest ones, None takes one away; other: as for `log`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train_gpt.py").write_text(script)
    code = other.pop("code", len(script.encode()))
    for seed, score in SCORES.items():
        (folder / f"train_seed{seed}.log").write_text(log(seed, score, code, **other))
    mean = sum(SCORES.values()) / len(SCORES)
    table = {
        "name": "an honest record",
        "val_bpb": round(mean, 4),
        "bytes_total": other.get("total", other.get("model", MODEL) + code),
        "bytes_code": code,
        "seed_results": {str(seed): {"val_bpb": score} for seed, score in SCORES.items()},
    }
    table |= claims or {}
    (folder / "submission.json").write_text(json.dumps({k: v for k, v in table.items() if v is not None}))
    (folder / "README.md").write_text("# A record\n\nRun: `SEED=1337 torchrun --nproc_per_node=8 train_gpt.py`\n")
    return folder
