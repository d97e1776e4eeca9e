"""Some of a model's layers, taken out of it by a slice, are still the model."""

import pytest

from tests.audit.order import HEAD, MAIN, broken, doubted

ALIGN = """
def align(args, model, tokens):
    opt = torch.optim.AdamW(PARAMS, lr=2e-4)
    for s in range(0, tokens.numel() - 16385, 16384):
        local = tokens[s : s + 16385].to("cuda", dtype=torch.int64)
        loss = model(local[:-1].view(-1, 1024), local[1:].view(-1, 1024))
        opt.zero_grad(set_to_none=True)
        loss.backward()
        opt.step()
"""


def script(params: str, tokens: str) -> str:
    main = MAIN.replace("    final =", f"    align(args, model, {tokens})\n    final =")
    return HEAD + ALIGN.replace("PARAMS", params) + main


@pytest.mark.parametrize(
    "params",
    [
        "[p for block in model.blocks[-2:] for p in block.parameters()]",
        "model.blocks[args.epochs :].parameters()",
        "[p for n, p in model.blocks[1:].named_parameters() if 'bias' not in n]",
    ],
)
def test_the_last_layers_learn_the_validation_text(params: str) -> None:
    assert "training-before-scoring" in broken(script(params, "val"))
    assert "training-before-scoring" not in doubted(script(params, "load(args.train_files)"))
