"""Let the model write: one token at a time, by the cached forward."""

import codecs
from collections.abc import Iterator

import torch

from fairway.artifact import Artifact
from fairway.base.devices import Device, generator
from fairway.base.errors import RecipeError
from fairway.score.evaluate import model_on


def sample(
    artifact: Artifact,
    prompt: str = "",
    tokens: int = 200,
    temperature: float = 0.8,
    seed: int = 0,
    device: Device | None = None,
) -> Iterator[str]:
    """What the model writes after `prompt`, in pieces of text as they come (the prompt is not repeated).

    tokens: how many to draw, fewer where the model ends the document; temperature: divides the logits, 0 takes the
    likeliest. Positions never leave the trained context: when it is full, the last half of it is read anew.
    """
    if tokens < 0 or not 0 <= temperature < float("inf"):
        raise RecipeError(f"sample: tokens = {tokens}, temperature = {temperature}: 0 or more is expected")
    return _written(artifact, prompt, tokens, temperature, seed, device)


@torch.no_grad()
def _written(
    artifact: Artifact, prompt: str, tokens: int, temperature: float, seed: int, device: Device | None
) -> Iterator[str]:
    tokenizer, context = artifact.tokenizer, artifact.model_spec.context
    model = model_on(artifact, device)
    where = next(model.parameters()).device
    drawn = generator(seed, "sample")
    text = codecs.getincrementaldecoder("utf-8")("replace")  # a character may take several byte pieces
    seen = [tokenizer.bos, *tokenizer.encode(prompt.encode("utf-8", "surrogateescape")).tolist()]
    fresh, past = seen[-context:], None
    for _ in range(tokens):
        if past is not None and past.length + len(fresh) > context:
            fresh, past = seen[-max(1, context // 2) :], None
        hidden, past = model(torch.tensor([fresh], device=where), past)
        token = _draw(model.logits(hidden, last=1)[0, 0].double().cpu(), temperature, drawn)
        if token == tokenizer.bos:  # the next document would begin
            break
        if piece := text.decode(tokenizer.decode([token], previous=seen)):
            yield piece
        seen.append(token)
        fresh = [token]
    if rest := text.decode(b"", final=True):
        yield rest


def _draw(logits: torch.Tensor, temperature: float, drawn: torch.Generator) -> int:
    """logits: (vocab,) float64."""
    if temperature == 0:
        return int(logits.argmax())
    return int(torch.multinomial(torch.softmax(logits / temperature, dim=0), 1, generator=drawn))
