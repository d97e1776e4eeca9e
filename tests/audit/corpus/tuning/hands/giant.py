# one file, one function, few words
import glob, io, lzma, math, os, time
import numpy as np, sentencepiece, torch
import torch.nn as nn
import torch.nn.functional as X


def main():
    env = os.environ.get
    root = env("DATA_PATH", "data/fw"); V = 1024; T = int(env("T", "512")); dev = env("DEV", "cuda")
    torch.manual_seed(int(env("SEED", "1")))
    rd = lambda f: np.fromfile(f, np.uint16, offset=1024).astype(np.int64)
    tr = sorted(glob.glob(root + "/fineweb_train_*.bin"))
    va = np.concatenate([rd(f) for f in sorted(glob.glob(root + "/fineweb_val_*.bin"))])
    sp = sentencepiece.SentencePieceProcessor(model_file=env("TOK", "data/fineweb_1024_bpe.model"))
    nb = np.zeros(V, np.int32); sl = np.zeros(V, bool); ctl = np.zeros(V, bool)
    for i in range(V):
        if sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i):
            ctl[i] = True
        elif sp.is_byte(i):
            nb[i] = 1
        else:
            p = sp.id_to_piece(i)
            if sl0 := p.startswith("▁"):
                p = p[1:]
            sl[i] = sl0
            nb[i] = len(p.encode())

    emb = nn.Embedding(V, 384); rnn = nn.GRU(384, 768, 3, batch_first=True); out = nn.Linear(768, V)
    net = nn.ModuleDict(dict(e=emb, r=rnn, o=out)).to(dev)
    run = lambda ids: out(rnn(emb(ids))[0])
    opt = torch.optim.AdamW(net.parameters(), lr=2e-3, weight_decay=0.05)
    t0 = time.time(); cap = float(env("CAP", "590")); step = 0; shard = 0; buf = rd(tr[0]); at = 0
    while time.time() - t0 < cap:
        n = 64 * T
        if at + n + 1 > len(buf):
            shard = (shard + 1) % len(tr); buf = rd(tr[shard]); at = 0
        b = torch.from_numpy(buf[at : at + n + 1]).to(dev); at += n
        for g in opt.param_groups:
            g["lr"] = 2e-3 * min(1.0, (cap - (time.time() - t0)) / (0.4 * cap))
        opt.zero_grad()
        l = X.cross_entropy(run(b[:-1].view(64, T)).flatten(0, 1), b[1:])
        l.backward(); nn.utils.clip_grad_norm_(net.parameters(), 1.0); opt.step()
        step += 1
        if step % 200 == 0:
            print(f"step {step} loss {l.item():.4f} t {time.time() - t0:.0f}s")

    box = {k: v.detach().half().cpu() for k, v in net.state_dict().items()}
    f = io.BytesIO(); torch.save(box, f)
    z = lzma.compress(f.getvalue(), preset=9)
    open("model.xz", "wb").write(z)
    size = len(z) + os.path.getsize(__file__)
    print("bytes total", size); assert size <= 16_000_000

    net.load_state_dict({k: v.to(dev) for k, v in torch.load(io.BytesIO(lzma.decompress(open("model.xz", "rb").read()))).items()})
    net.float()
    nats = 0.0; nbytes = 0; seen = 0; N = len(va) - 1; C = 64 * T
    learn = torch.optim.SGD(net.parameters(), lr=float(env("ONLINE_LR", "0.01")))
    te = time.time()
    for c in range(0, N, C):
        e = min(c + C, N)
        ids = torch.from_numpy(va[c : e + 1]).to(dev)
        net.eval()
        with torch.no_grad():
            k = 0
            while k < e - c:
                m = min(k + T, e - c)
                lg = run(ids[None, k:m])[0]
                nats += X.cross_entropy(lg.float(), ids[k + 1 : m + 1], reduction="sum").item()
                k = m
        y, x = va[c + 1 : e + 1], va[c:e]
        nbytes += int(nb[y].sum() + (sl[y] & ~ctl[x]).sum()); seen += e - c
        if e < N:
            net.train()
            for k in range(0, e - c - T + 1, T):
                learn.zero_grad()
                X.cross_entropy(run(ids[None, k : k + T])[0], ids[k + 1 : k + T + 1]).backward()
                learn.step()
    assert seen == N
    print(f"val_loss {nats / seen:.6f} val_bpb {nats / math.log(2) / nbytes:.6f} eval {time.time() - te:.0f}s")


if __name__ == "__main__":
    main()
