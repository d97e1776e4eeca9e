"""burray: banked weights + parallel Muon, GPTQ inside the 600 s, document windows with score-first TTT
and a document cache folded into the logits (one softmax over the whole vocabulary).
 python train_gpt.py prep docs_selected.jsonl   # shards from the released documents, only if yours are missing
 python train_gpt.py scan                       # do training shards hold validation documents?
 python train_gpt.py check                      # a few asserts on cpu, no data wanted
 python train_gpt.py sum logs/*.txt             # mean and spread of the final figures of several seeds
 torchrun --standalone --nproc_per_node=8 train_gpt.py
"""
from __future__ import annotations
import glob,hashlib,json,lzma,math,os,platform,queue,random,re,struct,sys,threading,time
import numpy as np
import sentencepiece as spm
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
try:from flash_attn_interface import flash_attn_func as fa3
except ImportError:fa3=None
# ---- knobs
E=lambda k,d:type(d)(os.environ.get(k,d))
class A:
 dp=E("DATA_PATH","./data/datasets/fineweb10B_sp1024")
 tp=E("TOKENIZER_PATH","./data/tokenizers/fineweb_1024_bpe.model")
 trf=os.path.join(dp,"fineweb_train_*.bin")
 vaf=os.path.join(dp,"fineweb_val_*.bin")
 out=E("OUT","model.burray")
 lg=E("LOG","")
 seed=E("SEED",1337)
 # data building
 vd=E("VAL_DOCS",50000)
 shn=E("SHARD_TOKENS",100_000_000)
 # shape
 V=E("VOCAB",1024)
 D=E("DIM",512)
 L=E("LAYERS",11)
 nh=E("HEADS",8)
 nk=E("KV_HEADS",4)
 mm=E("MLP_MULT",3)
 rd=E("ROPE_DIMS",16)
 rb=E("ROPE_BASE",10000.)
 cap_l=E("SOFTCAP",30.)
 qg=E("QK_GAIN",1.5)
 xs=E("XSA_LAST",4)
 nb=E("BIGRAMS",2048)
 bd=E("BIGRAM_DIM",128)
 vl=E("VE_LAYERS","9,10")
 # schedule
 it=E("ITERS",20000)
 cap=E("CAP",600.)
 rsv=E("RESERVE",26.)
 qrs=E("QUANT_RESERVE",12.)
 wu=E("WARMUP",20)
 wdn=E("WARMDOWN",.55)
 bt=E("BATCH_TOKENS",786432)
 T=E("SEQ",2048)
 ve=E("VAL_EVERY",0)
 le=E("LOG_EVERY",200)
 # muon / adam
 mlr=E("MUON_LR",.025)
 mmo=E("MUON_MOM",.99)
 mm0=E("MUON_MOM0",.92)
 mms=E("MUON_MOM_STEPS",1500)
 mnb=E("MUON_ROW_BETA",.95)
 mwd=E("MUON_WD",.04)
 elr=E("EMB_LR",.035)
 slr=E("SCALAR_LR",.025)
 hlr=E("HASH_LR",.03)
 awd=E("ADAM_WD",.04)
 b1=E("BETA1",.9)
 b2=E("BETA2",.95)
 cwd=E("CAUTIOUS",1)
 gc=E("CLIP",.3)
 gd=E("GATE_DIMS",12)
 # averages
 avg=E("AVG","ema")
 ed=E("EMA",.997)
 swe=E("SWA_EVERY",50)
 sws=E("SWA_START",.2)
 # quantisation
 qb=E("BITS",6)
 qx=E("BITS_OF","")
 cbn=E("CALIB_BATCHES",48)
 cbr=E("CALIB_ROWS",16)
 gblk=E("GPTQ_BLOCK",128)
 gdm=E("GPTQ_DAMP",.01)
 lim=E("LIMIT",16_000_000)
 # evaluation
 ew=E("EVAL_WINDOW",2048)
 st=E("STRIDE",64)
 eb=E("EVAL_TOKENS",65536)
 ck=E("CHUNK",65536)
 ttt=E("TTT",1)
 te=E("TTT_EPOCHS",3)
 tlr=E("TTT_LR",.002)
 tm=E("TTT_MOM",.9)
 tc=E("TTT_CLIP",1.)
 tb=E("TTT_SEQS",8)
 ts=E("TTT_SEQ",2048)
 tst=E("TTT_STOP",510.)
 twh=E("TTT_WHAT","all")
 # document cache
 cs=E("CACHE_SPAN",4096)
 c0=E("CACHE_W0",.02)
 c1=E("CACHE_W1",.25)
 c2=E("CACHE_W2",1.2)
 c3=E("CACHE_W3",3.)
 ct=E("CACHE_TAU",1500.)
 cg=E("CACHE_GAIN",.25)
 cgr=E("CACHE_GRID","0,.1,.15,.2,.25,.3,.4")
 cdn=E("CACHE_DOCS",512)
 # looks
 diag=E("DIAG",0)
 dbg=E("DEBUG",0)
 say=E("SAY",0)
 sav=E("SAVE","")
 pre=E("PREFETCH",2)
 bk=(128,256,512,1024,2048)
BOS=1
MG,VR,HW=20240520,1,256
R,W,LR_=E("RANK",0),E("WORLD_SIZE",1),E("LOCAL_RANK",0)
dev=torch.device("cuda",LR_) if torch.cuda.is_available() else torch.device("cpu")
f64,bf=torch.float64,torch.bfloat16
# ---- small things
_lf=None
def log(*a,all=False):
 if R and not all:return
 m=" ".join(map(str,a));print(m,flush=True)
 if _lf:
  with open(_lf,"a") as f:print(m,file=f)
def setlog():
 global _lf
 if R==0:
  os.makedirs("logs",exist_ok=True)
  _lf=A.lg or f"logs/burray_seed{A.seed}.txt"
  open(_lf,"w").close()
sync=lambda:torch.cuda.synchronize() if dev.type=="cuda" else None
bar=lambda:dist.barrier() if W>1 else None
def ar(t,op="SUM"):
 if W>1:dist.all_reduce(t,op=getattr(dist.ReduceOp,op))
 return t
# one number on which all ranks agree
mx=lambda v:float(ar(torch.tensor(float(v),device=dev,dtype=f64),"MAX"))
up=lambda n,k:-(-n//k)*k
class Clk:
 "seconds of training; off() and on() stand around the looks at validation, as in the starter script"
 def __init__(s):s.a,s.t=0.,None
 def on(s):
  sync();s.t=time.perf_counter();return s
 def off(s):
  sync();s.a+=time.perf_counter()-s.t;s.t=None;return s
 def __call__(s):return s.a+(0. if s.t is None else time.perf_counter()-s.t)
def seedall(k):
 random.seed(k);np.random.seed(k);torch.manual_seed(k)
 if dev.type=="cuda":torch.cuda.manual_seed_all(k)
class Pace:
 "how fast, and how long yet"
 def __init__(s,n):s.n,s.k,s.t=n,0,time.perf_counter()
 def __call__(s,k):
  s.k+=k;e=time.perf_counter()-s.t
  return f"{e:.0f}s {s.k/max(e,1e-9)/1e3:.0f}k/s eta {e*(s.n-s.k)/max(s.k,1):.0f}s"
@torch.no_grad()
def same(m,nm):
 "all ranks must hold the same weights; a drift would be told here"
 if W==1:return
 v=torch.stack([torch.stack((p.double().sum(),p.double().square().sum())) for p in m.parameters()])
 a,b=ar(v.clone(),"MIN"),ar(v.clone(),"MAX")
 d=((b-a)/b.abs().clamp_min(1e-9)).max().item()
 log(f"{nm}: ranks differ by {d:.1e}")
 if d>1e-3:
  for p in m.parameters():dist.broadcast(p.data,0)
  log(f"{nm}: weights of rank 0 sent to all")
# ---- shards
def ld(f):
 h=np.fromfile(f,"<i4",HW)
 if h.size!=HW or h[0]!=MG or h[1]!=VR:raise ValueError(f"bad header: {f}")
 n=int(h[2])
 if os.path.getsize(f)!=4*HW+2*n:raise ValueError(f"bad size: {f}")
 t=np.fromfile(f,"<u2",n,offset=4*HW)
 if t.size!=n:raise ValueError(f"short read: {f}")
 return t
def wr(f,t):
 h=np.zeros(HW,"<i4");h[:3]=MG,VR,len(t)
 with open(f,"wb") as o:o.write(h.tobytes());o.write(np.asarray(t,"<u2").tobytes())
def lst(p):
 if not(f:=sorted(glob.glob(p))):raise FileNotFoundError(p)
 return f
def vtok():return np.concatenate([ld(f) for f in lst(A.vaf)])
class Out:
 "collects tokens and writes a shard whenever one is full"
 def __init__(s,nm):s.nm,s.b,s.n,s.k=nm,[],0,0
 def add(s,t):
  s.b.append(t);s.n+=len(t)
  if s.n>=A.shn:s.flush()
 def flush(s):
  if not s.b:return
  wr(os.path.join(A.dp,f"fineweb_{s.nm}_{s.k:06d}.bin"),np.concatenate(s.b))
  s.k+=1;s.b,s.n=[],0
def text(f):
 with open(f,encoding="utf-8") as o:
  for l in o:yield json.loads(l)["text"]
def prep(f):
 "the first A.vd documents are validation, all others training; each document opens with BOS"
 os.makedirs(A.dp,exist_ok=True)
 sp=spm.SentencePieceProcessor(model_file=A.tp)
 va,tr=Out("val"),Out("train")
 for i,x in enumerate(text(f)):
  t=np.array([BOS]+sp.encode(x),"<u2")
  (va if i<A.vd else tr).add(t)
  if i%100000==0:print("doc",i,va.k,tr.k,flush=True)
 va.flush();tr.flush()
 print("val shards",va.k,"train shards",tr.k)
def heads(t,n=48):
 "a digest of the opening of every document that is long enough to have one of its own"
 s=np.flatnonzero(t==BOS);e=np.concatenate((s[1:],[len(t)]))
 return[hashlib.blake2b(t[a:a+n].tobytes(),digest_size=8).digest() for a,b in zip(s,e) if b-a>n]
def scan():
 "counts documents of the training shards that open as a validation document does"
 v=set(heads(vtok()));tot=hit=0
 print("validation openings",len(v))
 for f in lst(A.trf):
  h=heads(ld(f));k=sum(z in v for z in h)
  tot+=len(h);hit+=k
  print(os.path.basename(f),len(h),"documents,",k,"known",flush=True)
 print(f"{hit} of {tot} training documents open like a validation document ({100*hit/max(1,tot):.3f} %)")
def shards():
 "names, tokens and a digest of what the run reads, so that logs can be compared"
 h=hashlib.sha256();n=0
 for f in lst(A.trf)+lst(A.vaf):
  k=os.path.getsize(f);n+=(k-4*HW)//2
  with open(f,"rb") as o:
   h.update(os.path.basename(f).encode());h.update(o.read(4096))
   o.seek(max(0,k-4096));h.update(o.read())
 log(f"data: {len(lst(A.trf))}+{len(lst(A.vaf))} shards, {n} tokens, digest {h.hexdigest()[:16]}")
class Src:
 "endless walk over shards, in order"
 def __init__(s,fs):
  s.fs,s.i,s.p=fs,0,0
  s.t=ld(fs[0])
 def nxt(s):
  s.i=(s.i+1)%len(s.fs);s.p=0
  s.t=ld(s.fs[s.i])
 def take(s,n):
  o=[]
  while n>0:
   if(k:=min(n,len(s.t)-s.p))<=0:
    s.nxt();continue
   o.append(s.t[s.p:s.p+k]);s.p+=k;n-=k
  return o[0] if len(o)==1 else np.concatenate(o)
class Feed:
 "all ranks walk the same way, each keeps its own slice"
 def __init__(s,p):s.src=Src(lst(p))
 def host(s,tok,T):
  n=tok//W//T*T
  c=s.src.take((n+1)*W)[R*(n+1):(R+1)*(n+1)]
  t=torch.from_numpy(c.astype(np.int64))
  return t.pin_memory() if dev.type=="cuda" else t
 def cut(s,t,T):
  t=t.to(dev,non_blocking=True)
  return t[:-1].view(-1,T),t[1:].view(-1,T)
 def __call__(s,tok,T):return s.cut(s.host(tok,T),T)
class Ahead(Feed):
 "the same, with a thread that keeps a few batches ready"
 def __init__(s,p,tok,T,n):
  super().__init__(p)
  s.q,s.go=queue.Queue(max(1,n)),True
  s.th=threading.Thread(target=s.run,args=(tok,T),daemon=True);s.th.start()
 def run(s,tok,T):
  if dev.type=="cuda":torch.cuda.set_device(dev)
  while s.go:
   b=s.host(tok,T)
   while s.go:
    try:s.q.put(b,timeout=.5);break
    except queue.Full:pass
 def __call__(s,tok,T):return s.cut(s.q.get(),T)
 def close(s):
  s.go=False;s.th.join(5.)
# ---- bytes
def tabs(sp,V):
 "per token: its bytes without the space mark; has it one; is it a boundary (control, unknown, unused)"
 n=max(V,int(sp.vocab_size()))
 b,l,k=np.zeros(n,np.int64),np.zeros(n,bool),np.ones(n,bool)
 for i in range(int(sp.vocab_size())):
  if sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i):continue
  k[i]=False
  if sp.is_byte(i):
   b[i]=1;continue
  p=sp.id_to_piece(i)
  if p.startswith("▁"):
   l[i]=True;p=p[1:]
  b[i]=len(p.encode())
 return tuple(torch.from_numpy(z).to(dev) for z in(b,l,k))
def nby(tb,pv,y):
 "bytes of the targets y that follow pv: the mark is one byte, except after a boundary"
 return tb[0][y]+(tb[1][y]&~tb[2][pv]).long()
# ---- model
rn=lambda x:F.rms_norm(x,(x.size(-1),))
def rot(x,c,s):
 r=2*c.size(-1);a,b=x[...,:r].chunk(2,-1)
 return torch.cat((a*c-b*s,a*s+b*c,x[...,r:]),-1)
def xsa(y,v):
 "takes out of every head what points along its own value"
 B,T,h,d=y.shape;g=v.size(2)
 u=F.normalize(v,dim=-1).unsqueeze(3)
 y=y.reshape(B,T,g,h//g,d)
 return(y-(y*u).sum(-1,keepdim=True)*u).reshape(B,T,h,d)
def sdp(q,k,v):
 "causal attention over B x T x heads x d, keys and values in groups"
 if fa3 is not None and q.is_cuda:
  y=fa3(q,k,v,causal=True)
  return y[0] if isinstance(y,tuple) else y
 q,k,v=(z.transpose(1,2) for z in(q,k,v))
 return F.scaled_dot_product_attention(q,k,v,is_causal=True,enable_gqa=q.size(1)!=k.size(1)).transpose(1,2)
class Big(nn.Module):
 "hashed pair of the last two tokens; nothing reaches over a BOS"
 def __init__(s,n,d,D):
  super().__init__()
  s.n=n
  s.e=nn.Embedding(n,d)
  s.p=nn.Parameter(torch.zeros(D,d))
  s.g=nn.Parameter(torch.tensor([.05]))
  nn.init.zeros_(s.e.weight);nn.init.normal_(s.p,std=.02)
 def key(s,x):
  p=F.pad(x[:,:-1],(1,0),value=BOS)
  p=torch.where(x==BOS,torch.full_like(p,BOS),p)
  return torch.bitwise_xor(36313*x,27191*p)%s.n
 def forward(s,x):return F.linear(s.e(s.key(x)).to(bf),s.p.to(bf))*s.g.to(bf)
class M(nn.Module):
 def __init__(s):
  super().__init__()
  V,D,L,h,k=A.V,A.D,A.L,A.nh,A.nk
  s.V,s.D,s.L,s.h,s.k,s.d=V,D,L,h,k,D//h
  kd,Fd=k*s.d,A.mm*D
  s.emb=nn.Embedding(V,D)
  s.big=Big(A.nb,A.bd,D)
  s.vl=[int(z) for z in A.vl.split(",") if z]
  s.vem=nn.Embedding(V,kd)
  s.vsc=nn.Parameter(torch.full((max(1,len(s.vl)),),.3))
  # the four banks: q above o, k above v, and the two sides of the mlp
  s.qo=nn.Parameter(torch.empty(2*L,D,D))
  s.kv=nn.Parameter(torch.empty(2*L,kd,D))
  s.fu=nn.Parameter(torch.empty(L,Fd,D))
  s.fd=nn.Parameter(torch.empty(L,D,Fd))
  s.qgn=nn.Parameter(torch.full((L,h),A.qg))
  s.vr=nn.Parameter(torch.full((L,),-2.))
  s.lb=nn.Parameter(torch.zeros(V))
  s.agt=nn.Parameter(torch.zeros(L,h,A.gd))
  s.asc=nn.Parameter(torch.ones(L,D))
  s.msc=nn.Parameter(torch.ones(L,D))
  s.mix=nn.Parameter(torch.stack((torch.ones(L,D),torch.zeros(L,D)),1))
  s.ne=L//2
  s.skw=nn.Parameter(torch.ones(min(s.ne,L-s.ne),D))
  s.smg=nn.Parameter(torch.full((D,),-3.))
  s.tap=None
  f=1/A.rb**(torch.arange(0,A.rd,2).float()/A.rd)
  a=torch.outer(torch.arange(max(A.T,A.ew,A.ts)).float(),f)
  s.register_buffer("cs",a.cos()[None,:,None],persistent=False)
  s.register_buffer("sn",a.sin()[None,:,None],persistent=False)
  s.init()
 def init(s):
  nn.init.normal_(s.emb.weight,std=.005)
  nn.init.normal_(s.vem.weight,std=.01)
  pj=1/math.sqrt(2*s.L)
  with torch.no_grad():
   for i in range(s.L):
    for w in(s.qo[i],s.kv[i],s.kv[s.L+i],s.fu[i]):nn.init.orthogonal_(w)
    nn.init.zeros_(s.qo[s.L+i])
    nn.init.orthogonal_(s.fd[i],gain=pj)
 def smear(s,e,x):
  "a little of the token before; none at BOS, which opens a document"
  p=F.pad(e[:,:-1],(0,0,1,0))
  g=torch.sigmoid(s.smg).to(e.dtype)*(x!=BOS)[...,None].to(e.dtype)
  return(1-g)*e+g*p
 def att(s,i,n,ve,v0):
  B,T,_=n.shape
  if s.tap is not None:s.tap("a",i,n)
  q=F.linear(n,s.qo[i].to(n.dtype)).view(B,T,s.h,s.d)
  k=F.linear(n,s.kv[i].to(n.dtype)).view(B,T,s.k,s.d)
  v=F.linear(n,s.kv[s.L+i].to(n.dtype))
  if v0 is None:v0=v
  else:
   l=torch.sigmoid(s.vr[i]).to(n.dtype);v=(1-l)*v+l*v0
  if ve is not None:v=v+ve
  v=v.view(B,T,s.k,s.d)
  c,z=s.cs[:,:T].to(n.dtype),s.sn[:,:T].to(n.dtype)
  q=rot(rn(q),c,z)*s.qgn[i].to(n.dtype)[:,None]
  k=rot(rn(k),c,z)
  y=sdp(q,k,v)
  if i>=s.L-A.xs:y=xsa(y,v)
  y=y*(2*torch.sigmoid(F.linear(n[...,:A.gd],s.agt[i].to(n.dtype))))[...,None]
  y=y.reshape(B,T,s.D)
  if s.tap is not None:s.tap("o",i,y)
  return F.linear(y,s.qo[s.L+i].to(n.dtype)),v0
 def mlp(s,i,n):
  if s.tap is not None:s.tap("u",i,n)
  z=F.leaky_relu(F.linear(n,s.fu[i].to(n.dtype)),.5).square()
  if s.tap is not None:s.tap("d",i,z)
  return F.linear(z,s.fd[i].to(n.dtype))
 def blk(s,i,x,x0,ve,v0):
  m=s.mix[i].to(x.dtype);x=m[0]*x+m[1]*x0
  r=1/math.sqrt(i+1)
  y,v0=s.att(i,rn(x)*r,ve,v0)
  x=x+s.asc[i].to(x.dtype)*y
  return x+s.msc[i].to(x.dtype)*s.mlp(i,rn(x)*r),v0
 def hid(s,x):
  e=rn(s.emb(x).to(bf)+s.big(x))
  h=x0=s.smear(e,x)
  vb=s.vem(x).to(bf)
  sk,v0=[],None
  for i in range(s.L):
   if i>=s.ne and sk:
    j=i-s.ne
    h=h+s.skw[j].to(bf)*sk.pop()
   ve=vb*s.vsc[s.vl.index(i)].to(bf) if i in s.vl else None
   h,v0=s.blk(i,h,x0,ve,v0)
   if i<s.ne:sk.append(h)
  return rn(h)
 def lgt(s,h):
  z=F.linear(h,s.emb.weight.to(h.dtype)).float()+s.lb
  return A.cap_l*torch.tanh(z/A.cap_l)
 def forward(s,x,y):
  "the sum of the losses; a target of -1 is none"
  return F.cross_entropy(s.lgt(s.hid(x)).flatten(0,1),y.flatten(),ignore_index=-1,reduction="sum")
 def banks(s):return[s.fu,s.fd,s.qo,s.kv]
 def small(s):
  k={id(p) for p in s.banks()};return[p for p in s.parameters() if id(p) not in k]
# ---- parallel muon
PE=[(8.156554524902461,-22.48329292557795,15.878769915207462),(4.042929935166739,-2.808917465908714,.5000178451051316),
 (3.8916678022926607,-2.772484153217685,.5060648178503393),(3.285753657755655,-2.3681294933425376,.46449024233003106),
 (2.3465413258596377,-1.7097828382687081,.42323551169305323)]
@torch.compile
def ns(g):
 "polar express: five steps towards the nearest orthogonal matrix, many matrices at once"
 x=g.to(bf);t=x.size(-2)>x.size(-1)
 if t:x=x.mT
 x=x/(x.norm(dim=(-2,-1),keepdim=True)*1.02+1e-6)
 for a,b,c in PE:
  y=x@x.mT
  x=a*x+(b*y+c*(y@y))@x
 return x.mT if t else x
@torch.compile
def even(u,v,b):
 "rows of equal size (a running second moment), the whole as long as before"
 u=u.float();n=u.norm(dim=(-2,-1),keepdim=True)
 v.lerp_(u.square().mean(-1,keepdim=True),1-b)
 z=u*torch.rsqrt(v+1e-10)
 return(z*(n/(z.norm(dim=(-2,-1),keepdim=True)+1e-10))).to(bf)
class Muon:
 """A bank is cut along its first axis: gradients go out by reduce-scatter (launch), every rank
 orthogonalises its own matrices, and updates come back by all-gather while the next bank is at work."""
 def __init__(s,ps):
  s.ps,s.st,s.q=ps,[],[]
  for p in ps:
   n=up(p.size(0),W);k=n//W;z=lambda m:torch.zeros(m,*p.shape[1:],device=p.device,dtype=bf)
   s.st.append(dict(n=n,k=k,pad=z(n),sh=z(k),mo=z(k),all=z(n),v=torch.zeros(k,p.size(1),1,device=p.device),sc=max(1,p.size(1)/p.size(2))**.5))
 def launch(s):
  s.q=[]
  for p,t in zip(s.ps,s.st):
   t["pad"][:p.size(0)].copy_(p.grad)
   f=None
   if W>1:f=dist.reduce_scatter_tensor(t["sh"],t["pad"],op=dist.ReduceOp.AVG,async_op=True)
   else:t["sh"].copy_(t["pad"])
   s.q.append(f)
 @torch.no_grad()
 def step(s,lr,mo):
  pr=None
  for p,t,f in zip(s.ps,s.st,s.q):
   if f is not None:f.wait()
   t["mo"].mul_(mo).add_(t["sh"])
   u=even(ns(t["sh"].add(t["mo"],alpha=mo)),t["v"],A.mnb).contiguous()
   g=None
   if W>1:g=dist.all_gather_into_tensor(t["all"],u,async_op=True)
   else:t["all"].copy_(u)
   if pr:s.put(*pr,lr)
   pr=(p,t,g,u)
  s.put(*pr,lr)
  s.q=[]
 def put(s,p,t,g,_,lr):
  if g is not None:g.wait()
  u=t["all"][:p.size(0)].to(p.dtype)
  # decay only where the update goes the same way
  if A.cwd:p.sub_(p*(u*p>0),alpha=lr*A.mwd)
  else:p.mul_(1-lr*A.mwd)
  p.add_(u,alpha=-lr*t["sc"])
 def zero(s):
  for t in s.st:t["mo"].zero_();t["v"].zero_()
def adam(m):
 e,h=[m.emb.weight],[m.big.e.weight,m.vem.weight]
 k={id(p) for p in e+h};o=[p for p in m.small() if id(p) not in k]
 gs=[dict(params=e,lr=A.elr,b=A.elr,weight_decay=A.awd),dict(params=h,lr=A.hlr,b=A.hlr,weight_decay=A.awd)]
 gs.append(dict(params=o,lr=A.slr,b=A.slr,weight_decay=0.))
 return torch.optim.AdamW(gs,betas=(A.b1,A.b2),eps=1e-8,fused=dev.type=="cuda")
def red(ps,op="AVG"):
 "all-reduce of many gradients as one"
 if W==1:return
 f=ar(torch.cat([p.grad.reshape(-1) for p in ps]),op);o=0
 for p in ps:
  n=p.numel();p.grad.copy_(f[o:o+n].view_as(p));o+=n
class Avg:
 "an exponential average of all steps and a plain one of the warmdown"
 def __init__(s,ps):
  s.ps,s.n=ps,0
  s.e=[p.detach().clone() for p in ps]
  s.w=[torch.zeros_like(p) for p in ps]
 @torch.no_grad()
 def see(s,st,k):
  torch._foreach_lerp_(s.e,[p.detach() for p in s.ps],1-min(A.ed,(st+1)/(st+10)))
  if k<A.sws and st%A.swe==0:
   torch._foreach_add_(s.w,[p.detach() for p in s.ps]);s.n+=1
 @torch.no_grad()
 def put(s,k):
  w=[z/max(1,s.n) for z in s.w]
  v=s.e if k=="ema" or not s.n else w if k=="swa" else[(a+b)/2 for a,b in zip(s.e,w)]
  for p,z in zip(s.ps,v):p.copy_(z)
# ---- quantisation
class Hs:
 "second moments of what goes into every bank's matrices; the model calls it where tap is set"
 def __init__(s,m):
  z=lambda d:torch.zeros(m.L,d,d,device=dev)
  s.h=dict(a=z(m.D),o=z(m.D),u=z(m.D),d=z(A.mm*m.D));s.n=0
 def __call__(s,k,i,x):
  x=x.detach().flatten(0,-2).float()
  s.h[k][i].addmm_(x.T,x)
  if k=="a" and i==0:s.n+=x.size(0)
 def fin(s):
  n=ar(torch.tensor(float(s.n),device=dev))
  for z in s.h.values():ar(z).div_(n.clamp_min(1))
  return s.h
@torch.no_grad()
def hess(m,clk,till):
 "training batches from the last shard, as many as fit before `till` on the training clock"
 fd=Feed(A.trf);fd.src.i=len(fd.src.fs)-2;fd.src.nxt()
 h=Hs(m);m.tap=h;k=0
 while k<A.cbn and mx(clk())<till:
  x,_=fd(A.cbr*A.T*W,A.T)
  m.hid(x);k+=1
 m.tap=None
 log(f"hessians: {k} batches of {A.cbr*W}x{A.T} training tokens, clock {clk():.2f}s")
 return h.fin()
def rows(w,q):
 "per row the scale whose rounding errs least"
 a=w.abs().amax(-1).clamp_min(1e-8)
 bs=torch.full_like(a,1e30);be=a/q
 for f in(1.,.96,.92,.88,.84,.8,.75,.7,.65,.6):
  z=(a*f/q).half().float().clamp_min(1e-7);r=z[...,None]
  e=((w/r).round().clamp(-q,q)*r-w).square().sum(-1)
  k=e<bs;bs=torch.where(k,e,bs);be=torch.where(k,z,be)
 return be
@torch.no_grad()
def gptq(w,h,bits):
 "w: n x R x C, h: n x C x C; all n at once, columns in falling order of their second moment"
 q=2**(bits-1)-1
 n,r,c=w.shape
 w,h=w.float().clone(),h.float().clone()
 g=h.diagonal(dim1=1,dim2=2)
 dead=g<=0;g[dead]=1.
 w.masked_fill_(dead[:,None,:],0.)
 g.add_(A.gdm*g.mean(-1,keepdim=True))
 s=rows(w,q)
 p=g.argsort(-1,descending=True)
 w=w.gather(2,p[:,None,:].expand(n,r,c))
 h=h.gather(1,p[:,:,None].expand(n,c,c)).gather(2,p[:,None,:].expand(n,c,c))
 hi=torch.cholesky_inverse(torch.linalg.cholesky(h))
 u=torch.linalg.cholesky(hi,upper=True)
 o=torch.zeros(n,r,c,dtype=torch.int8,device=w.device)
 for a in range(0,c,A.gblk):
  b=min(c,a+A.gblk)
  x=w[:,:,a:b].clone();er=torch.zeros_like(x);v=u[:,a:b,a:b]
  for j in range(b-a):
   y=x[:,:,j]
   z=(y/s).round().clamp(-q,q)
   o[:,:,a+j]=z.to(torch.int8)
   e=(y-z*s)/v[:,j,j,None]
   x[:,:,j:]-=e[:,:,None]*v[:,None,j,j:]
   er[:,:,j]=e
  if b<c:w[:,:,b:]-=er@u[:,a:b,b:]
 ip=p.argsort(-1)
 return o.gather(2,ip[:,None,:].expand(n,r,c)),s.half()
def rtn(w,bits=8):
 q=2**(bits-1)-1
 s=rows(w.float(),q)
 return(w.float()/s[...,None]).round().clamp(-q,q).to(torch.int8),s.half()
@torch.no_grad()
def squeeze(m,h):
 "name -> tensors: two (integers, row scales) or one (half)"
 L=m.L;o={};bx={k:int(v) for k,v in(z.split(":") for z in A.qx.split(",") if z)}
 for k,w,hh in(("q",m.qo[:L],h["a"]),("o",m.qo[L:],h["o"]),("k",m.kv[:L],h["a"]),("v",m.kv[L:],h["a"]),("fu",m.fu,h["u"]),("fd",m.fd,h["d"])):
  o[k]=gptq(w,hh,bx.get(k,A.qb))
 bn={id(p) for p in m.banks()}
 for k,p in m.named_parameters():
  if id(p) in bn:continue
  o[k]=rtn(p.data) if p.ndim==2 and p.numel()>65535 else(p.data.half(),)
 return o
def ent(q):
 "bits that an ideal coder spends per integer"
 c=torch.bincount(q.flatten().long()+128,minlength=256).double()
 p=c[c>0]/c.sum();return float(-(p*p.log2()).sum())
def told(o):
 n=b=0
 for k,v in o.items():
  if len(v)<2:
   b+=16*v[0].numel();continue
  e=ent(v[0]);n+=v[0].numel();b+=e*v[0].numel()+16*v[1].numel()
  log(f" {k}: {list(v[0].shape)} {e:.3f} bits, zeros {(v[0]==0).float().mean().item():.3f}")
 log(f"integers {n}, ideal size {b/8:.0f} bytes")
def unsqueeze(o):
 f=lambda v:v[0].float() if len(v)==1 else v[0].float()*v[1].float()[...,None]
 d={k:f(v) for k,v in o.items()}
 d["qo"]=torch.cat((d.pop("q"),d.pop("o")));d["kv"]=torch.cat((d.pop("k"),d.pop("v")))
 return d
NT={"int8":np.int8,"float16":np.float16}
FL=[dict(id=lzma.FILTER_LZMA2,preset=9|lzma.PRESET_EXTREME,lc=0,lp=0,pb=0)]
def dump(o,meta):
 hd,bb=[],[]
 for k,v in o.items():
  a=[np.ascontiguousarray(z.cpu().numpy()) for z in v]
  hd.append([k,[[z.dtype.name,list(z.shape)] for z in a]])
  # integers lie column by column: neighbours then share their place in the row
  bb+=[(np.ascontiguousarray(z.swapaxes(-1,-2)) if z.dtype==np.int8 else z).tobytes() for z in a]
 j=json.dumps(dict(meta=meta,t=hd),separators=(",",":")).encode()
 return lzma.compress(struct.pack("<I",len(j))+j+b"".join(bb),format=lzma.FORMAT_XZ,filters=FL)
def undump(b):
 b=lzma.decompress(b);n=struct.unpack("<I",b[:4])[0]
 j=json.loads(b[4:4+n]);p=4+n;o={}
 for k,v in j["t"]:
  r=[]
  for t,sh in v:
   c=math.prod(sh);z=np.frombuffer(b,NT[t],c,p);p+=z.nbytes
   if t=="int8":z=z.reshape(*sh[:-2],sh[-1],sh[-2]).swapaxes(-1,-2)
   r.append(torch.from_numpy(np.array(z.reshape(sh),order="C")))
  o[k]=tuple(r)
 return o,j["meta"]
def thin(o,f):
 "the share f of the ones in rows of the smallest scales become zeros"
 if f<=0:return o
 bk=("q","o","k","v","fu","fd")
 s=torch.cat([(o[k][1].float()[...,None].expand(o[k][0].shape))[o[k][0].abs()==1].cpu() for k in bk])
 c=s.kthvalue(max(1,int(f*s.numel())))[0].item()
 z=dict(o)
 for k in bk:
  q,w=o[k];z[k]=(torch.where((q.abs()==1)&(w.float()[...,None]<=c),torch.zeros_like(q),q),w)
 return z
def fit(o,meta,code):
 "the mildest thinning that brings code plus artifact under the limit"
 for f in(0.,.03,.06,.1,.15,.25):
  b=dump(thin(o,f),meta)
  log(f"pack: thin {f} -> {len(b)} bytes")
  if len(b)+code<=A.lim:return b
 raise RuntimeError("does not fit")
# ---- windows of one document
def docs(t):
 "(s,e): the inputs s..e-1 of a document, whose targets are s+1..e; the next BOS is the last target"
 s=np.flatnonzero(t==BOS)
 if not len(s) or s[0]:s=np.concatenate(([0],s))
 e=np.concatenate((s[1:],[len(t)-1]))
 return[(int(a),int(b)) for a,b in zip(s,e) if b>a]
def groups(D,n):
 "documents in order, gathered to chunks of at least n tokens"
 o,c,k=[],[],0
 for s,e in D:
  c.append((s,e));k+=e-s
  if k>=n:o.append(c);c,k=[],0
 if c:o.append(c)
 return o
def wins(s,e,w,st):
 "windows a..b of one document, of which c..b is scored; the first scores all it has"
 c=s
 while c<e:
  b=min(e,c+(w if c==s else st))
  yield s,max(s,b-w),b,c
  c=b
def plan(D,r,n,w):
 "this rank's batches of fixed shape: (length, scored, rows, windows)"
 k={}
 for s,e in D:
  for x in wins(s,e,A.ew,A.st):
   T=next(z for z in A.bk if z>=x[2]-x[1])
   k.setdefault((T,T if x[3]==x[1] else A.st),[]).append(x)
 for(T,q),v in sorted(k.items()):
  v=v[r::n];m=max(1,w//T)
  for i in range(0,len(v),m):yield T,q,m,v[i:i+m]
td=lambda a:torch.from_numpy(a).to(dev,non_blocking=True)
def mk(t,T,q,r,v):
 "x: windows; h: what the cache may see of the document; ix, jx: columns asked in x and h; y: targets or -1; po: places in the document"
 C=T if q==T else A.cs
 z=lambda m,f:np.full((r,m),f,np.int64)
 x,h,ix,jx,y,po=z(T,0),z(C,-1),z(q,0),z(q,0),z(q,-1),z(q,0)
 for i,(s,a,b,c) in enumerate(v):
  u=max(s,b-C);k=b-c
  x[i,:b-a]=t[a:b]
  h[i,:b-u]=t[u:b]
  ix[i,:k]=np.arange(c-a,b-a)
  jx[i,:k]=np.arange(c-u,b-u)
  y[i,:k]=t[c+1:b+1]
  po[i,:k]=np.arange(c-s,b-s)
 return tuple(map(td,(x,h,ix,jx,y,po)))
# ---- the document cache
def cc(h,jx,V):
 """For each column asked, weighted counts of what followed earlier in the document, over all of V: after
 anything (c0), after the same token (c1), after the same two (c2) or three (c3); older matches weigh less."""
 C=h.size(1);j=torch.arange(C,device=h.device)
 y=h.gather(1,jx)
 hp=F.pad(h[:,:-1],(1,0),value=-2)
 hq=F.pad(h[:,:-2],(2,0),value=-3)
 p,q=hp.gather(1,jx),hq.gather(1,jx)
 nx=F.pad(h[:,1:],(0,1),value=-1)
 age=(jx[:,:,None]-j).float()
 past=age>0
 m1=(h[:,None,:]==y[:,:,None])&past
 m2=m1&(hp[:,None,:]==p[:,:,None])
 m3=m2&(hq[:,None,:]==q[:,:,None])
 w=(A.c0*past+A.c1*m1+A.c2*m2+A.c3*m3)*torch.exp(-age.clamp_min(0)/A.ct)
 oh=F.one_hot(nx.clamp_min(0),V).to(bf)*(nx>=0)[...,None].to(bf)
 return torch.bmm(w.to(bf),oh).float()
def mixl(z,c,g):
 "log-probabilities of every token: the model's logits, lifted by the cache, through one softmax"
 return F.log_softmax(z+g*torch.log1p(c),-1)
@torch.no_grad()
def look(m,hf,x,ix):
 "logits at the asked columns only"
 z=hf(x)
 return m.lgt(z.gather(1,ix[...,None].expand(-1,-1,z.size(-1))))
class Pos:
 "losses by how far into its document a target stands, in powers of two; for the log only"
 def __init__(s,n=18):s.n,s.a=n,torch.zeros(n,2,device=dev,dtype=f64)
 def see(s,nl,ok,po):
  k=torch.log2(po.float()+1).floor().long().clamp_max(s.n-1)[ok]
  s.a.index_add_(0,k,torch.stack((nl[ok],torch.ones_like(nl[ok])),1))
 def show(s):
  ar(s.a)
  log("loss by place: "+" ".join(f"<{2**(i+1)-1}:{a/b:.4f}" for i,(a,b) in enumerate(s.a.tolist()) if b))
@torch.no_grad()
def score(m,hf,bt,g,tb,acc,ps):
 x,h,ix,jx,y,po=bt
 lp=mixl(look(m,hf,x,ix),cc(h,jx,m.V),g)
 ok=y>=0;yy=y.clamp_min(0)
 nl=-lp.gather(2,yy[...,None]).squeeze(2).to(f64)
 by=nby(tb,h.gather(1,jx).clamp_min(0),yy)
 acc+=torch.stack(((nl*ok).sum(),(by*ok).sum().to(f64),ok.sum().to(f64)))
 ps.see(nl,ok,po)
 return lp
@torch.no_grad()
def pick(m,clk,till):
 "the gain of the cache: the best of the grid on training documents, before `till` on the training clock"
 gs=[float(z) for z in A.cgr.split(",")]
 t=ld(lst(A.trf)[-1])[:8_000_000];D=docs(t)[:A.cdn]
 a=torch.zeros(len(gs)+1,device=dev,dtype=f64)
 for T,q,r,v in plan(D,R,W,A.eb):
  sync()
  if clk()>till:break
  x,h,ix,jx,y,_=mk(t,T,q,r,v)
  z,c=look(m,m.hid,x,ix),cc(h,jx,m.V)
  ok=y>=0;yy=y.clamp_min(0)[...,None]
  for i,g in enumerate(gs):a[i]-=(mixl(z,c,g).gather(2,yy).squeeze(2).to(f64)*ok).sum()
  a[-1]+=ok.sum()
 ar(a);n=a[-1].item()
 if n<10000:
  log("gain: too few training tokens seen, keeping",A.cg);return A.cg
 l=(a[:-1]/n).tolist()
 k=min(range(len(gs)),key=l.__getitem__)
 log("gain on training documents:"," ".join(f"{g}:{z:.5f}" for g,z in zip(gs,l)),f"-> {gs[k]} ({n:.0f} tokens, clock {clk():.2f}s)")
 return gs[k]
# ---- test-time training
class Ada:
 "SGD on a chunk, all of whose targets stand in the sum already; sequences are dealt to the ranks"
 def __init__(s,m):
  bn={id(p) for p in m.banks()};no=("emb.weight","vem.weight")
  ok=dict(all=lambda k,p:k not in no,banks=lambda k,p:id(p) in bn,gains=lambda k,p:p.numel()<65536)[A.twh]
  for k,p in m.named_parameters():p.requires_grad_(ok(k,p))
  s.ps=[p for p in m.parameters() if p.requires_grad]
  s.op=torch.optim.SGD(s.ps,lr=A.tlr,momentum=A.tm)
  s.f=torch.compile(m,dynamic=False) if dev.type=="cuda" else m
  s.mb=max(1,A.tb//W);s.n=0
 def seqs(s,t,a,b,k):
  x,y=np.zeros((s.mb,A.ts),np.int64),np.full((s.mb,A.ts),-1,np.int64)
  for j in range(s.mb):
   u=a+(k+j*W+R)*A.ts;v=min(b,u+A.ts)
   if u<b:x[j,:v-u]=t[u:v];y[j,:v-u]=t[u+1:v+1]
  return td(x),td(y)
 def __call__(s,t,a,b):
  B=s.mb*W
  for _ in range(A.te):
   for k in range(0,-(-(b-a)//A.ts),B):
    n=min(b,a+(k+B)*A.ts)-(a+k*A.ts)
    x,y=s.seqs(t,a,b,k)
    s.op.zero_grad(set_to_none=True)
    with torch.enable_grad():(s.f(x,y)/n).backward()
    red(s.ps,"SUM")
    nn.utils.clip_grad_norm_(s.ps,A.tc)
    s.op.step();s.n+=1
# ---- evaluation
def ckn(lp):
 "every row of probabilities sums to one"
 e=lp.exp().sum(-1).sub(1).abs().max().item()
 if e>1e-3:raise RuntimeError(f"rows sum to 1 +- {e}")
 return e
def tell(nm,acc,s,**kw):
 l,b,n=acc.tolist()
 x=l/max(n,1);y=l/math.log(2)/max(b,1)
 log(f"{nm} val_loss:{x:.8f} val_bpb:{y:.8f} tokens:{n:.0f} bytes:{b:.0f} time:{s:.1f}s"," ".join(f"{k}:{v}" for k,v in kw.items()))
 return x,y
def final(m,t,tb,g):
 "chunk by chunk: score all windows of its documents, then learn from them"
 t0=time.perf_counter()
 G=groups(docs(t),A.ck)
 hf=torch.compile(m.hid,dynamic=False) if dev.type=="cuda" else m.hid
 ad=Ada(m) if A.ttt else None
 acc,ps=torch.zeros(2,3,device=dev,dtype=f64),Pos()
 m.eval();err=None;pc=Pace(len(t)-1)
 for i,D in enumerate(G):
  for T,q,r,v in plan(D,R,W,A.eb):
   lp=score(m,hf,mk(t,T,q,r,v),g,tb,acc[int(q!=T)],ps)
   if err is None:err=ckn(lp)
  pc(D[-1][1]-D[0][0])
  if ad and i+1<len(G) and mx(time.perf_counter()-t0)<A.tst:ad(t,D[0][0],D[-1][1])
  if i%50==0:log(f"chunk {i+1}/{len(G)} running_loss:{(acc[:,0].sum()/acc[:,2].sum().clamp_min(1)).item():.5f} "+pc(0))
 ar(acc);sync()
 tot=acc.sum(0)
 if int(tot[2])!=len(t)-1:raise RuntimeError(f"scored {int(tot[2])} of {len(t)-1}")
 el=mx(time.perf_counter()-t0)
 for k,z in zip(("heads","tails"),acc):log(f"{k}: {z[2]:.0f} tokens, loss {(z[0]/z[2].clamp_min(1)).item():.5f}")
 ps.show();same(m,"after evaluation")
 return(*tell("final",tot,el,gain=g,ttt_steps=ad.n if ad else 0,rows_err=f"{err or 0:.1e}"),el)
def slide(m,t,tb,g):
 "the same windows with a model that learns nothing; for comparison, behind DIAG"
 t0=time.perf_counter();acc,ps=torch.zeros(3,device=dev,dtype=f64),Pos()
 for D in groups(docs(t),A.ck):
  for T,q,r,v in plan(D,R,W,A.eb):score(m,m.hid,mk(t,T,q,r,v),g,tb,acc,ps)
 ar(acc);sync()
 return acc,time.perf_counter()-t0
@torch.no_grad()
def flat(f,t,tb,T,r):
 "plain validation: sequences side by side, no overlap, nothing learned"
 t0=time.perf_counter();n=len(t)-1
 q=[(a,min(n,a+T)) for a in range(0,n,T)][R::W]
 acc=torch.zeros(3,device=dev,dtype=f64)
 for i in range(0,len(q),r):
  x,y=np.zeros((r,T),np.int64),np.full((r,T),-1,np.int64)
  for j,(a,b) in enumerate(q[i:i+r]):x[j,:b-a]=t[a:b];y[j,:b-a]=t[a+1:b+1]
  x,y=td(x),td(y);ok=y>=0
  l=f(x,y)
  acc+=torch.stack((l.to(f64),(nby(tb,x,y.clamp_min(0))*ok).sum().to(f64),ok.sum().to(f64)))
 ar(acc);sync()
 return acc,time.perf_counter()-t0
def recount(sp,t,tb,n=400):
 "bytes of the first documents as the table has them and as decoding gives them"
 a=b=0
 for s,e in docs(t)[:n]:
  z=torch.from_numpy(t[s:e].astype(np.int64)).to(dev)
  a+=int(nby(tb,z[:-1],z[1:]).sum())
  b+=len(sp.decode([int(k) for k in t[s+1:e]]).encode())
 log(f"bytes of {n} documents: table {a}, decoded {b}")
# ---- training
def sched(now):
 "one until the warmdown, then a straight line to the end of the budget; `now` is the same on all ranks"
 f=now/(A.cap-A.rsv)
 return 1. if f<1-A.wdn else max(0.,(1-f)/A.wdn)
def mom(st):
 f=min(1,st/max(1,A.mms));return A.mm0+(A.mmo-A.mm0)*f
def step(cf,fd,mu,ad,sm,ac,k,mo):
 l=torch.zeros((),device=dev)
 for _ in range(ac):
  x,y=fd(A.bt//ac,A.T)
  z=cf(x,y)/(x.numel()*ac)
  z.backward();l+=z.detach()
 mu.launch()
 red(sm)
 nn.utils.clip_grad_norm_(sm,A.gc)
 for g in ad.param_groups:g["lr"]=g["b"]*k
 ad.step()
 mu.step(A.mlr*k,mo)
 ad.zero_grad(set_to_none=True)
 for p in mu.ps:p.grad=None
 return l
def warm(m,*a):
 "compiles and allocates on training batches, then puts weights and optimisers back"
 cf,fd,mu,ad,sm,ac=a
 w={k:v.detach().clone() for k,v in m.state_dict().items()}
 for i in range(A.wu):
  step(*a,1.,A.mm0)
  if i+1==A.wu:log(f"warmup {i+1}/{A.wu}")
 m.load_state_dict(w)
 mu.zero();ad.state.clear()
def norms(m):
 return" ".join(f"{k}={p.detach().float().norm().item():.3f}" for k,p in m.named_parameters() if p.numel()>1e5)
def train(m,clk,va,tb):
 ac=max(1,8//W)
 cf=torch.compile(m,dynamic=False)
 mu,ad,sm=Muon(m.banks()),adam(m),m.small()
 if A.wu:warm(m,cf,Feed(A.trf),mu,ad,sm,ac)
 fd=Ahead(A.trf,A.bt//ac,A.T,A.pre) if A.pre else Feed(A.trf)
 av=Avg(list(m.parameters()))
 end=A.cap-A.rsv;st=0;now=0.
 bar();clk.on()
 while True:
  last=st>=A.it or now>=end
  if last or A.ve and st and st%A.ve==0:
   clk.off()
   c,s=flat(cf,va,tb,A.T,A.bt//ac//W//A.T)
   tell(f"step:{st}",c,s,clock=f"{clk():.2f}s")
   clk.on()
  if last:break
  k=sched(now)
  l=step(cf,fd,mu,ad,sm,ac,k,mom(st))
  av.see(st,k);st+=1
  now=mx(clk())
  if st<=10 or st%A.le==0:
   log(f"step:{st}/{A.it} train_loss:{ar(l/W).item():.4f} lr:{k:.4f} clock:{now:.2f}s avg:{1000*now/st:.2f}ms")
   if A.dbg:log(norms(m))
 log(f"stopped at step {st}, clock {clk():.2f}s of {A.cap:.0f}s, swa {av.n}")
 if dev.type=="cuda":log(f"peak memory {torch.cuda.max_memory_allocated()>>20} MiB")
 if A.pre:fd.close()
 av.put(A.avg);same(m,"average")
 if A.sav and R==0:torch.save({k:v.cpu() for k,v in m.state_dict().items()},A.sav)
 return st
def build(m,clk,code):
 "Hessians, gain and quantisation, all on the training clock; then the file"
 ql=A.cap-A.qrs
 h=hess(m,clk,ql-4)
 g=pick(m,clk,ql)
 o=squeeze(m,h)
 sync();u=mx(clk());clk.off()
 log(f"train+calibration+gptq: {u:.2f}s of {A.cap:.0f}s")
 if u>A.cap:raise RuntimeError("over the cap; raise RESERVE")
 if R==0:
  t0=time.perf_counter();told(o)
  b=fit(o,dict(g=g,v=1),code)
  with open(A.out,"wb") as f:f.write(b)
  log(f"packed in {time.perf_counter()-t0:.1f}s")
 bar()
def sizes(code):
 a=os.path.getsize(A.out)
 log(f"code {code} bytes, artifact {a} bytes, total {a+code} bytes (limit {A.lim})")
 if a+code>A.lim:raise RuntimeError("too large")
 return a
def reread():
 "a fresh model out of the file, nothing else"
 with open(A.out,"rb") as f:o,meta=undump(f.read())
 m=M().to(dev)
 d=unsqueeze(o);k=m.load_state_dict(d,strict=True)
 if dev.type!="cuda":m=m.float()
 log("reread:",k,"gain",meta["g"])
 return m,meta
@torch.no_grad()
def speak(m,sp,n,T=200,tmp=.8):
 "a few samples from the model as re-read, for the eye"
 x=torch.full((n,1),BOS,device=dev)
 for _ in range(T):
  p=F.softmax(m.lgt(m.hid(x)[:,-1:])[:,0]/tmp,-1)
  x=torch.cat((x,torch.multinomial(p,1)),1)
 for i,z in enumerate(x.tolist()):
  e=next((j for j,k in enumerate(z[1:],1) if k==BOS),len(z))
  log(f"sample {i}: {sp.decode(z[1:e])!r}")
def census(t):
 "how long the documents are, in powers of two"
 n=np.array([e-s for s,e in docs(t)])
 k=np.floor(np.log2(n)).astype(int)
 log(f"documents: {len(n)}, median {int(np.median(n))}, longest {n.max()}; "+" ".join(f"2^{j}:{(k==j).sum()}" for j in range(k.max()+1) if(k==j).any()))
 if len(n)!=A.vd:log(f"note: {A.vd} documents were expected")
def summ(fs):
 "every log's final line, their mean, spread and standard error"
 o=[]
 for f in fs:
  with open(f) as h:m=re.findall(r"^final val_loss:(\S+) val_bpb:(\S+) tokens:(\d+)",h.read(),re.M)
  if len(m)!=1:print(f,"holds",len(m),"final lines");continue
  o.append(tuple(map(float,m[0])));print(f,*m[0])
 if len({z[2] for z in o})>1:print("token counts differ")
 for i,k in enumerate(("val_loss","val_bpb")):
  v=np.array([z[i] for z in o])
  if len(v):print(k,f"mean {v.mean():.8f} sd {v.std(ddof=1) if len(v)>1 else 0:.8f} n {len(v)}")
def check():
 "asserts on cpu: windows, cache, packing"
 rg=np.random.default_rng(0)
 t=rg.integers(2,64,9000).astype("<u2");t[0]=BOS
 t[rg.integers(1,9000,7)]=BOS;t[5000:8000][t[5000:8000]==BOS]=2
 D=docs(t)
 assert sum(e-s for s,e in D)==len(t)-1
 n=np.zeros(len(t),int)
 for s,e in D:
  for _,a,b,c in wins(s,e,512,64):
   assert s<=a<=c<b<=e and b-a<=512
   n[c+1:b+1]+=1
 assert n[0]==0 and(n[1:]==1).all()
 assert[x for g in groups(D,500) for x in g]==D
 k=sum(len(v) for r in range(3) for *_,v in plan(D,r,3,A.eb))
 assert k==sum(1 for s,e in D for _ in wins(s,e,A.ew,A.st))
 # what comes after a column does not move its counts
 h=torch.from_numpy(t[5001:5201].astype(np.int64))[None]
 j=torch.arange(200)[None];a=cc(h,j,64)
 h2=h.clone();h2[:,120:]=3;b=cc(h2,j,64)
 assert torch.equal(a[:,:120],b[:,:120]) and not torch.equal(a,b)
 lp=mixl(torch.randn(1,200,64),a,.3);assert ckn(lp)<1e-4
 # and what stood before the document does not either: windows open at its BOS
 for T,q,r,v in plan(D,0,1,A.eb):
  x,hh,ix,jx,y,po=mk(t,T,q,r,v)
  for i,(s,a,b,c) in enumerate(v):
   assert x[i,0]==t[a] and (x[i,1:b-a]!=BOS).all() and (y[i]>=0).sum()==b-c
   assert (x[i].gather(0,ix[i])[:b-c]==hh[i].gather(0,jx[i])[:b-c]).all()
   assert int(po[i,0])==c-s and (y[i,:b-c].numpy()==t[c+1:b+1]).all()
 # integers survive the file
 w=torch.randn(3,32,48);x=torch.randn(3,400,48);hh=x.mT@x/400
 q,s=gptq(w,hh,6);o=dict(q=(q,s),g=(torch.randn(7).half(),))
 z,mt=undump(dump(o,dict(g=.1)))
 assert all(torch.equal(p,r) for y in o for p,r in zip(o[y],z[y])) and mt["g"]==.1
 f=lambda v:((v-w)@hh@(v-w).mT).diagonal(dim1=1,dim2=2).sum()
 r,rs=rtn(w,6)
 assert f(q.float()*s.float()[...,None])<f(r.float()*rs.float()[...,None])
 print("check: fine")
def bench(n=20):
 "milliseconds of the parts on random weights and tokens"
 m=M().to(dev);x=torch.randint(2,A.V,(16,A.T),device=dev)
 h=x.clone();j=torch.arange(A.T-A.st,A.T,device=dev).expand(16,-1)
 full=torch.arange(A.T,device=dev).expand(16,-1)
 def tim(nm,f):
  f();sync();t0=time.perf_counter()
  for _ in range(n):f()
  sync();print(f"{nm}: {1000*(time.perf_counter()-t0)/n:.2f} ms",flush=True)
 with torch.no_grad():
  tim("hidden, eager",lambda:m.hid(x))
  tim("cache, stride",lambda:cc(h,j,A.V))
  tim("cache, whole window",lambda:cc(h,full,A.V))
  tim("logits, whole window",lambda:mixl(look(m,m.hid,x,full),torch.zeros((),device=dev),0.))
  tim("hessian, mlp",lambda:(lambda z:z.T@z)(torch.randn(16*A.T,A.mm*A.D,device=dev)))
 tim("forward and backward",lambda:(m(x,x)/x.numel()).backward())
 mu=Muon(m.banks());mu.launch()
 tim("muon",lambda:(mu.launch(),mu.step(1e-4,.9)))
 q=torch.randn(A.L,A.D,A.D,device=dev);k=torch.randn(A.L,4*A.D,A.D,device=dev)
 n=2;tim("gptq, one square bank",lambda:gptq(q,k.mT@k,A.qb))
def facts(src):
 log(f"python {platform.python_version()} torch {torch.__version__} world {W} sha256 {hashlib.sha256(src).hexdigest()}")
 if dev.type=="cuda":log(torch.cuda.get_device_name(dev))
 log(" ".join(f"{k}={v}" for k,v in vars(A).items() if k[0]!="_"))
def sane():
 "settings that cannot work are told at once"
 bad=[m for c,m in(
  (A.D%A.nh==0,"DIM over HEADS"),(A.nh%A.nk==0,"HEADS over KV_HEADS"),((A.D//A.nh)>A.rd>0 and A.rd%2==0,"ROPE_DIMS"),
  (8%W==0,"world size must divide 8"),(A.bt//max(1,8//W)//W>=A.T,"BATCH_TOKENS too small"),(A.ew<=A.bk[-1],"EVAL_WINDOW over the last bucket"),
  (0<A.st<A.ew,"STRIDE"),(A.cs>=A.ew,"CACHE_SPAN under EVAL_WINDOW"),(A.cap<=600,"CAP over 600 s"),(A.rsv>A.qrs+4,"RESERVE under QUANT_RESERVE"),
  (A.avg in("ema","swa","mix"),"AVG"),(A.twh in("all","banks","gains"),"TTT_WHAT"),(3<=A.qb<=8,"BITS"),(A.gd<=A.D,"GATE_DIMS")) if not c]
 if bad:raise SystemExit("settings: "+"; ".join(bad))
def main():
 if sys.argv[1:2]==["prep"]:return prep(sys.argv[2])
 if sys.argv[1:2]==["check"]:return check()
 if sys.argv[1:2]==["bench"]:return bench()
 if sys.argv[1:2]==["scan"]:return scan()
 if sys.argv[1:2]==["sum"]:return summ(sys.argv[2:])
 if dev.type!="cuda":raise SystemExit("wants a GPU")
 torch.cuda.set_device(dev)
 if W>1:dist.init_process_group("nccl",device_id=dev)
 torch.backends.cuda.matmul.allow_tf32=torch.backends.cudnn.allow_tf32=True
 torch._dynamo.config.cache_size_limit=32
 setlog();seedall(A.seed)
 with open(__file__,"rb") as f:src=f.read()
 facts(src);sane();shards()
 sp=spm.SentencePieceProcessor(model_file=A.tp)
 if int(sp.vocab_size())!=A.V:raise ValueError(f"tokenizer has {sp.vocab_size()} pieces, not {A.V}")
 if sp.bos_id()!=BOS:raise ValueError("BOS is another")
 tb=tabs(sp,A.V);va=vtok()
 log(f"validation: {len(va)} tokens, {int((va==BOS).sum())} documents; train shards: {len(lst(A.trf))}")
 recount(sp,va,tb);census(va)
 m=M().to(dev)
 if W>1:
  for p in m.parameters():dist.broadcast(p.data,0)
 log(f"parameters {sum(p.numel() for p in m.parameters())}, of them in banks {sum(p.numel() for p in m.banks())}")
 clk=Clk()
 train(m,clk,va,tb)
 build(m,clk,len(src))
 art=sizes(len(src))
 del m;torch.cuda.empty_cache()
 m,meta=reread()
 if A.diag:
  c,s=flat(m,va,tb,A.T,16);tell("roundtrip (plain, not the score)",c,s)
  for g in(0.,meta["g"]):
   c,s=slide(m,va,tb,g);tell(f"windows, cache gain {g} (not the score)",c,s)
 loss,bpb,el=final(m,va,tb,meta["g"])
 log(f"evaluation took {el:.1f}s of 600s")
 if A.say:speak(m,sp,A.say)
 if R==0:
  with open("result.json","w") as f:json.dump(dict(val_loss=loss,val_bpb=bpb,seed=A.seed,bytes_total=art+len(src),bytes_code=len(src),eval_s=el),f,indent=1)
 if W>1:dist.destroy_process_group()
if __name__=="__main__":main()
