# purefn: parameters are a dict of tensors, everything is a function of them. A gated convolution stack over sp1024 tokens.
# At evaluation the stream runs in lanes; each lane carries a fast vector (a shift of the hidden state) that follows the
# gradient of losses already counted. vmap keeps the lanes apart.
import functools
import glob
import io
import math
import os
import time
import zlib

import numpy as np
import sentencepiece as spm
import torch
import torch.nn.functional as F
from torch.func import grad, grad_and_value, vmap

env = lambda name, default: type(default)(os.environ.get(name, default))
DATA = env("DATA_PATH", "data/datasets/fineweb10B_sp1024")
SPM = env("TOKENIZER_PATH", "data/tokenizers/fineweb_1024_bpe.model")
V, D, L, K = env("VOCAB_SIZE", 1024), env("MODEL_DIM", 640), env("NUM_LAYERS", 14), env("KERNEL", 8)
SEQ, ROWS = env("TRAIN_SEQ_LEN", 1024), env("TRAIN_ROWS", 128)
LIMIT = env("MAX_WALLCLOCK_SECONDS", 600.0)
LANES, STEP = env("EVAL_LANES", 256), env("EVAL_STEP", 128)
FAST_LR, FAST_DECAY = env("FAST_LR", 0.05), env("FAST_DECAY", 0.998)
gpu = torch.device("cuda")


# ---- data


def tokens_of(kind):
    for path in sorted(glob.glob(f"{DATA}/fineweb_{kind}_*.bin")):
        head = np.memmap(path, "<i4", "r", shape=(256,))
        yield np.memmap(path, "<u2", "r", offset=1024, shape=(int(head[2]),))


def batches(rng):
    while True:
        for t in tokens_of("train"):
            for _ in range(len(t) // (SEQ * ROWS)):
                at = rng.integers(0, len(t) - SEQ - 1, ROWS)
                yield torch.from_numpy(np.stack([t[a : a + SEQ + 1] for a in at]).astype(np.int64)).to(gpu)


def byte_table():
    sp = spm.SentencePieceProcessor(model_file=SPM)
    table = np.zeros((2, V), np.int64)  # row 0: after a control token (a text begins), row 1: after any other
    control = np.array([sp.is_control(i) or sp.is_unknown(i) for i in range(V)])
    for i in range(V):
        if control[i]:
            continue
        text = sp.id_to_piece(i)
        n = 1 if sp.is_byte(i) else len(text.lstrip("\u2581").encode())
        marks = 0 if sp.is_byte(i) else len(text) - len(text.lstrip("\u2581"))
        table[1, i] = n + marks
        table[0, i] = n + max(marks - 1, 0)
    return torch.from_numpy(table).to(gpu), torch.from_numpy(~control).long().to(gpu)


# ---- model: (params, hidden shift, tokens) -> logits


def init(gen):
    draw = lambda *shape, scale: torch.randn(*shape, generator=gen, device=gpu) * scale
    p = {"emb": draw(V, D, scale=0.02), "out": draw(V, D, scale=0.02)}
    for i in range(L):
        p[f"{i}.conv"] = draw(2 * D, 1, K, scale=K**-0.5)
        p[f"{i}.mix"] = draw(D, 2 * D, scale=(2 * D) ** -0.5)
        p[f"{i}.back"] = torch.zeros(D, D, device=gpu)
        p[f"{i}.skip"] = torch.ones(D, device=gpu)
    return p


def layer(p, i, x):
    """x (T, D). A depthwise causal convolution with a doubling reach, gated, mixed, added."""
    reach = 2 ** (i % 7)
    left = F.pad(F.rms_norm(x, (D,)).T, ((K - 1) * reach, 0))
    wide = F.conv1d(left[None].repeat(1, 2, 1), p[f"{i}.conv"], groups=2 * D, dilation=reach)[0].T
    a, b = wide.chunk(2, -1)
    h = torch.cat((a * b.sigmoid(), F.silu(b)), -1) @ p[f"{i}.mix"].T
    return x * p[f"{i}.skip"] + F.gelu(h) @ p[f"{i}.back"].T


def logits(p, shift, ids):
    x = p["emb"][ids]
    for i in range(L):
        x = layer(p, i, x)
    return (F.rms_norm(x, (D,)) + shift) @ p["out"].T


def mean_loss(p, shift, row):
    return F.cross_entropy(logits(p, shift, row[:-1]), row[1:])


def batch_loss(p, rows):
    return vmap(mean_loss, in_dims=(None, None, 0), chunk_size=16)(p, torch.zeros(D, device=gpu), rows).mean()


# ---- training: Adam as a fold over batches


def adam(p, m, v, g, t, lr):
    new = {}
    for k in p:
        m[k] = torch.lerp(m[k], g[k], 0.1)
        v[k] = torch.lerp(v[k], g[k].square(), 0.02)
        new[k] = p[k] * (1 - lr * 0.05) - lr * (m[k] / (1 - 0.9**t)) / ((v[k] / (1 - 0.98**t)).sqrt() + 1e-9)
    return new


def fit(p):
    zeros = lambda: {k: torch.zeros_like(x) for k, x in p.items()}
    m, v, began = zeros(), zeros(), time.time()
    for t, rows in enumerate(batches(np.random.default_rng(env("SEED", 5))), 1):
        with torch.autocast("cuda", torch.bfloat16):
            g, loss = grad_and_value(batch_loss)(p, rows)
        part = (time.time() - began) / LIMIT
        if part >= 0.98:
            break
        p = adam(p, m, v, g, t, 0.003 * min(t / 100, 1.0, 3 * (1 - part)))
        if t % 100 == 0:
            print(f"step:{t} train_loss:{loss.item():.4f} train_time:{1000 * (time.time() - began):.0f}ms", flush=True)
    return p


# ---- the file


def freeze(p, path="purefn.z"):
    box = {}
    for k, x in p.items():
        s = x.abs().amax(-1, keepdim=True).clamp_min(1e-8) / 31
        box[k] = ((x / s).round().to(torch.int8).cpu(), s.half().cpu())
    torch.save(box, f := io.BytesIO())
    raw = zlib.compress(f.getvalue(), 9)
    with open(path, "wb") as out:
        out.write(raw)
    return len(raw)


def thaw(path="purefn.z"):
    with open(path, "rb") as f:
        box = torch.load(io.BytesIO(zlib.decompress(f.read())), map_location=gpu)
    return {k: q.float() * s.float() for k, (q, s) in box.items()}


# ---- evaluation


def losses_at(p, shift, context, goal):
    """Of one lane: nats of the last STEP places."""
    z = logits(p, shift, context)[-STEP:].float()
    return F.cross_entropy(z, goal, reduction="none")


def counted(p, stream, table, open_text):
    """STEP tokens of every lane at a time: (nats, tokens, bytes); then each lane's shift follows those tokens' gradient."""
    n = stream.numel() - 1
    each = -(-n // (LANES * STEP)) * STEP
    history = 1024
    padded = F.pad(stream, (history, LANES * each - n))
    first = torch.arange(LANES, device=gpu) * each
    shift = torch.zeros(LANES, D, device=gpu)
    for a in range(0, each, STEP):
        at = first[:, None] + a + torch.arange(STEP, device=gpu)
        real = at < n
        before = padded[first[:, None] + a + torch.arange(history + STEP, device=gpu)][:, STEP:]
        goal, prev = padded[history + at + 1], padded[history + at]
        with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
            nll = vmap(losses_at, in_dims=(None, 0, 0, 0))(p, shift, before, goal)
        yield torch.stack((nll[real].double().sum(), real.sum(), table[open_text[prev], goal][real].sum()))
        pull = lambda s, ids, y, w: (losses_at(p, s, ids, y) * w).mean()
        with torch.autocast("cuda", torch.bfloat16):
            slope = vmap(grad(pull), in_dims=(0, 0, 0, 0))(shift, before, goal, real.float())
        shift = FAST_DECAY * shift - FAST_LR * slope


def main():
    start = time.time()
    gen = torch.Generator(device=gpu).manual_seed(env("SEED", 5))
    p = fit(init(gen))
    print(f"training ended after {time.time() - start:.1f}s")
    size, code = freeze(p), os.path.getsize(__file__)
    print(f"model {size} + code {code} = {size + code} bytes")
    assert size + code <= 16_000_000
    p = thaw()
    stream = torch.from_numpy(np.concatenate(list(tokens_of("val"))).astype(np.int64)).to(gpu)
    table, open_text = byte_table()
    start = time.time()
    nats, tokens, size = functools.reduce(torch.add, counted(p, stream, table, open_text)).tolist()
    assert tokens == stream.numel() - 1
    print(f"val_loss:{nats / tokens:.8f} val_bpb:{nats / math.log(2) / size:.8f} eval_time:{1000 * (time.time() - start):.0f}ms")


if __name__ == "__main__":
    main()
