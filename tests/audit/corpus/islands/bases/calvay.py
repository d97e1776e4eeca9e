# calvay | 11L d512 sp1024, layers 3-5 run twice, int6 GPTQ, brotli/lzma, stride 64 window, score-first chunk TTT, count cache + pair hint
# torchrun --standalone --nproc_per_node=8 train_gpt.py        (every byte of this file counts, hence the style)
import os,sys,time,math,glob,json,lzma,random,uuid,subprocess;from pathlib import Path;from types import SimpleNamespace as NS
import numpy as np,torch,torch._dynamo,torch.distributed as dist,torch.nn as nn,torch.nn.functional as F,sentencepiece as spm
try:import brotli
except ImportError:brotli=None

# ---- settings: any key, upper case, may come from the environment
D=dict(
 **dict(data='./data/datasets/fineweb10B_sp1024',tok='./data/tokenizers/fineweb_1024_bpe.model',out='final_model.int6.ptz',logd='logs',run='',seed=1337),
 **dict(vocab=1024,bos=1,dim=512,nl=11,nh=8,nkv=4,mlp=3,cap=30.,rb=1e4,rd=16,qg=1.5,xsa=4,tstd=.005),
 **dict(l0=3,l1=5,lat=.35,bgv=2048,bgd=128,ved=128,vel='9,10'),
 **dict(iters=20000,warm=20,wd_it=3500,btok=786432,sl=2048,tmax=600.,tres=40.,tcal=12.,vev=4000,lev=500),
 **dict(mlr=.025,elr=.035,slr=.025,mm=.99,mm0=.92,mmw=1500,nst=5,mwd=.04,awd=.04,b1=.9,b2=.95,eps=1e-8,gc=.3),
 **dict(ema=.997,swe=50,swf=.2,swb=.5),
 **dict(cb=64,cbs=4,blk=128,damp=.01,qm=31,qme=127,cgrid=9,lim=16_000_000),
 **dict(st=64,eb=32,ttt=1,tc=32768,tep=3,tlr=.002,tmom=.9,tgc=1.,tfz=2,te=540.,slide=0),
 **dict(dttt=0,dr=8,dl=4,dc=256,dlr=.003,chk=0,smp=0,raw=''),
 **dict(cache=1,lam=.03,lh0=2.5,cdec=.9995,cmin=32.,beta=.35,bmax=4,tau=1.))
h=NS(**{k:type(v)(os.environ.get(k.upper(),v)) for k,v in D.items()});h.run=h.run or str(uuid.uuid4())[:8]
V=h.vocab;L=h.sl;LN2=math.log(2.);src=Path(__file__).read_text(encoding='utf-8')
CTL=('as','ms','mx','qg','skw','sm.g','bg.s','ve.s')  # small tensors, kept in fp16 and trained by Adam

# ---- ranks
rk,ws,lr_=(int(os.environ.get(k,d)) for k,d in (('RANK',0),('WORLD_SIZE',1),('LOCAL_RANK',0)))
dd='RANK' in os.environ;main_=rk==0;dev=torch.device('cuda',lr_);LOGF=None
def say(*a,con=True):
 if not main_:return
 s=' '.join(map(str,a));con and print(s,flush=True)
 if LOGF:
  with open(LOGF,'a') as f:f.write(s+'\n')
def ar(t,op=None):
 if dd:dist.all_reduce(t,op=op or dist.ReduceOp.SUM)
 return t
def bc(t):
 if dd:dist.broadcast(t,0)
 return t
def now():torch.cuda.synchronize();return time.perf_counter()
def setup():
 global LOGF
 assert torch.cuda.is_available(),'needs CUDA';assert 8%ws==0,ws
 torch.cuda.set_device(dev)
 if dd:dist.init_process_group('nccl',device_id=dev);dist.barrier()
 if main_:os.makedirs(h.logd,exist_ok=True);LOGF=f'{h.logd}/{h.run}.txt'
 b=torch.backends;b.cuda.matmul.allow_tf32=b.cudnn.allow_tf32=True
 for f,v in ((b.cuda.enable_flash_sdp,1),(b.cuda.enable_cudnn_sdp,0),(b.cuda.enable_mem_efficient_sdp,0),(b.cuda.enable_math_sdp,0)):f(bool(v))
 torch._dynamo.config.cache_size_limit=64;random.seed(h.seed);np.random.seed(h.seed);torch.manual_seed(h.seed);torch.cuda.manual_seed_all(h.seed)
 say(src,con=False);say('='*80,con=False);say('python',sys.version.split()[0],'torch',torch.__version__,'world',ws)
 say(subprocess.run(['nvidia-smi'],capture_output=True,text=True,check=False).stdout,con=False);say(json.dumps(vars(h)))

# ---- data: shards are 256 int32 of header (magic, version, count), then uint16 tokens
def rsh(f):
 f=Path(f);hd=np.fromfile(f,dtype='<i4',count=256);assert hd.size==256 and hd[0]==20240520 and hd[1]==1,f'bad header {f}'
 n=int(hd[2]);assert f.stat().st_size==1024+2*n,f'bad size {f}'
 return np.fromfile(f,dtype='<u2',count=n,offset=1024)
def fls(k):
 g=sorted(glob.glob(f'{h.data}/fineweb_{k}_*.bin'));assert g,f'no {k} shards under {h.data}';return g
trf=lambda:fls('train')
def vtok():return torch.from_numpy(np.concatenate([rsh(f) for f in fls('val')]).astype(np.int64))
class Strm:  # endless tokens, shard after shard
 def __init__(s,fs,off=0):s.fs=fs;s.i=off%len(fs);s.t=rsh(s.fs[s.i]);s.p=0
 def nxt(s):s.i=(s.i+1)%len(s.fs);s.t=rsh(s.fs[s.i]);s.p=0
 def take(s,n):
  o=[]
  while n>0:
   if s.p>=len(s.t):s.nxt()
   k=min(n,len(s.t)-s.p);o.append(s.t[s.p:s.p+k]);s.p+=k;n-=k
  return o[0] if len(o)==1 else np.concatenate(o)
class Load:  # every rank reads the same stream and keeps its own span of each global batch
 def __init__(s,fs,off=0):s.s=Strm(fs,off)
 def get(s,tot,l,acc):
  n=tot//(ws*acc);n-=n%l;c=s.s.take(ws*(n+1));z=torch.from_numpy(c[rk*(n+1):(rk+1)*(n+1)].astype(np.int64)).pin_memory().to(dev,non_blocking=True)
  return z[:-1].view(-1,l),z[1:].view(-1,l)

# ---- bytes per token, out of the sentencepiece model
def luts(sp):
 n=max(int(sp.vocab_size()),V);B,S,C=np.zeros(n,np.int32),np.zeros(n,bool),np.ones(n,bool)
 for i in range(int(sp.vocab_size())):
  if sp.is_control(i) or sp.is_unknown(i) or sp.is_unused(i):continue
  C[i]=False
  if sp.is_byte(i):B[i]=1;continue
  p=sp.id_to_piece(i)
  if p[:1]=='▁':S[i]=True;p=p[1:]
  B[i]=len(p.encode('utf-8'))
 return tuple(torch.from_numpy(a).to(dev) for a in (B,S,C))
def nby(lt,prev,tgt):  # bytes of tgt; a leading space counts unless the token before is a control one
 B,S,C=lt;return B[tgt].long()+(S[tgt]&~C[prev]).long()

# ---- optimizers
@torch.compile
def ns5(G,k=5):
 a,b,c=3.4445,-4.775,2.0315;X=G.bfloat16();t=X.size(-2)>X.size(-1);X=X.mT if t else X;X=X/(X.norm(dim=(-2,-1),keepdim=True)+1e-7)
 for _ in range(k):A=X@X.mT;X=a*X+(b*A+c*A@A)@X
 return X.mT if t else X
class Muon(torch.optim.Optimizer):
 def __init__(s,ps,lr,mom,wd,k):super().__init__(ps,dict(lr=lr,mom=mom,wd=wd,k=k))
 @torch.no_grad()
 def step(s):
  for g in s.param_groups:
   ps=g['params'];n=sum(p.numel() for p in ps);u=torch.zeros(n,device=dev,dtype=torch.bfloat16);o=0
   for i,p in enumerate(ps):
    if i%ws==rk and p.grad is not None:
     st=s.state[p];m=st.setdefault('m',torch.zeros_like(p.grad));m.mul_(g['mom']).add_(p.grad)
     d=ns5(p.grad.add(m,alpha=g['mom']),g['k'])*max(1,p.size(-2)/p.size(-1))**.5;u[o:o+p.numel()]=d.reshape(-1)
    o+=p.numel()
   ar(u);o=0
   for p in ps:p.mul_(1-g['lr']*g['wd']).add_(u[o:o+p.numel()].view_as(p).to(p.dtype),alpha=-g['lr']);o+=p.numel()

# ---- model
rn=lambda x:F.rms_norm(x,(x.size(-1),))
class Lin(nn.Linear):  # fp32 weight, cast where used
 def __init__(s,i,o,z=False):
  super().__init__(i,o,bias=False);s.z=z
 def forward(s,x):return F.linear(x,s.weight.to(x.dtype))
class Rope(nn.Module):
 def __init__(s):
  super().__init__();f=h.rb**(-torch.arange(0,h.rd,2).float()/h.rd);a=torch.outer(torch.arange(L).float(),f)
  s.register_buffer('c',a.cos()[None,:,None],persistent=False);s.register_buffer('s_',a.sin()[None,:,None],persistent=False)
 def forward(s,x):  # partial: only the first rd of every head turn
  n=x.size(1);r,q=x[...,:h.rd],x[...,h.rd:];a,b=r.chunk(2,-1);c,z=s.c[:,:n].to(x.dtype),s.s_[:,:n].to(x.dtype)
  return torch.cat((a*c+b*z,b*c-a*z,q),-1)
class Attn(nn.Module):
 def __init__(s,i):
  super().__init__();d=h.dim;s.hd=d//h.nh;s.kv=h.nkv*s.hd;s.x=i>=h.nl-h.xsa
  s.q=Lin(d,d);s.k=Lin(d,s.kv);s.v=Lin(d,s.kv);s.o=Lin(d,d,True);s.qg=nn.Parameter(torch.full((h.nh,),h.qg));s.r=Rope()
 def forward(s,x,ve=None):
  b,n,d=x.shape;q=s.q(x).view(b,n,h.nh,s.hd);k=s.k(x).view(b,n,h.nkv,s.hd);v=s.v(x)
  if ve is not None:v=v+ve
  v=v.view(b,n,h.nkv,s.hd);q=s.r(rn(q))*s.qg.to(x.dtype)[None,None,:,None];k=s.r(rn(k))
  y=F.scaled_dot_product_attention(q.transpose(1,2),k.transpose(1,2),v.transpose(1,2),is_causal=True,enable_gqa=True).transpose(1,2)
  if s.x:  # take out of y what lies along the position's own value
   w=F.normalize(v,dim=-1)[:,:,:,None];z=y.reshape(b,n,h.nkv,-1,s.hd);y=(z-(z*w).sum(-1,keepdim=True)*w)
  return s.o(y.reshape(b,n,d))
class Mlp(nn.Module):
 def __init__(s):super().__init__();s.u=Lin(h.dim,h.mlp*h.dim);s.d=Lin(h.mlp*h.dim,h.dim,True)
 def forward(s,x):return s.d(F.leaky_relu(s.u(x),.5).square())
class Blk(nn.Module):
 def __init__(s,i):
  super().__init__();d=h.dim;s.a=Attn(i);s.m=Mlp();s.as_=nn.Parameter(torch.ones(d));s.ms=nn.Parameter(torch.ones(d));s.mx=nn.Parameter(torch.stack((torch.ones(d),torch.zeros(d))));s.f=1/math.sqrt(i+1)
 def forward(s,x,x0,ve=None):
  m=s.mx.to(x.dtype);x=m[0]*x+m[1]*x0;x=x+s.as_.to(x.dtype)*s.a(rn(x)*s.f,ve);return x+s.ms.to(x.dtype)*s.m(rn(x)*s.f)
class Smear(nn.Module):  # a little of the token before, never across a document's start
 def __init__(s):super().__init__();s.g=nn.Parameter(torch.full((h.dim,),-3.))
 def forward(s,x,t):
  g=torch.sigmoid(s.g.to(x.dtype))*(t!=h.bos).to(x.dtype)[...,None];p=F.pad(x[:,:-1],(0,0,1,0));return (1-g)*x+g*p
class Big(nn.Module):  # hashed pair (t-1,t) of inputs -> embedding
 def __init__(s):super().__init__();s.e=nn.Embedding(h.bgv,h.bgd);s.p=Lin(h.bgd,h.dim,True);s.s=nn.Parameter(torch.tensor(.05));nn.init.zeros_(s.e.weight)
 def forward(s,t):
  k=torch.cat((torch.full_like(t[:,:1],h.bgv-1),torch.bitwise_xor(36313*t[:,1:],27191*t[:,:-1])%(h.bgv-1)),1);return s.p(s.e(k).bfloat16())*s.s.to(torch.bfloat16)
class Vemb(nn.Module):
 def __init__(s):super().__init__();s.e=nn.Embedding(V,h.ved);s.p=Lin(h.ved,h.nkv*h.dim//h.nh,True);s.s=nn.Parameter(torch.tensor(.1));nn.init.normal_(s.e.weight,std=.01)
 def forward(s,t):return s.p(s.e(t).bfloat16())*s.s.to(torch.bfloat16)
class GPT(nn.Module):
 def __init__(s):
  super().__init__();s.e=nn.Embedding(V,h.dim);s.bg=Big();s.sm=Smear();s.ve=Vemb();s.b=nn.ModuleList(Blk(i) for i in range(h.nl));s.vl={int(i) for i in h.vel.split(',')}
  s.skw=nn.Parameter(torch.ones((h.nl+h.l1-h.l0+1)//2,h.dim));s.lp=False;nn.init.normal_(s.e.weight,std=h.tstd)
  for m in s.modules():
   if isinstance(m,Lin):nn.init.zeros_(m.weight) if m.z else nn.init.orthogonal_(m.weight)
 def seq(s):r=list(range(h.nl));return r[:h.l1+1]+r[h.l0:] if s.lp else r  # depth recurrence
 def hid(s,t):
  x=s.sm(rn(s.e(t).bfloat16()+s.bg(t)),t);x0=x;v=s.ve(t);o=s.seq();n=len(o)//2;sk=[]
  for j,i in enumerate(o):
   if j>=n and sk:k=len(sk)-1;x=x+s.skw[k].to(x.dtype)*sk.pop()
   x=s.b[i](x,x0,v if i in s.vl else None);j<n and sk.append(x)
  return rn(x)
 def forward(s,t,y=None):
  z=F.linear(s.hid(t),s.e.weight.bfloat16());z=h.cap*torch.tanh(z.float()/h.cap)
  return z if y is None else F.cross_entropy(z.view(-1,V),y.reshape(-1),ignore_index=-100)
isctl=lambda n,p:p.ndim<2 or any(c in n for c in CTL)
def groups(m):
 mat,emb,ctl=[],[],[]
 for n,p in m.named_parameters():(emb if n.endswith('e.weight') else ctl if isctl(n,p) else mat).append(p)
 A=lambda ps,lr:torch.optim.AdamW([dict(params=ps,lr=lr)],betas=(h.b1,h.b2),eps=h.eps,weight_decay=h.awd,fused=True)
 os_=[Muon(mat,h.mlr,h.mm,h.mwd,h.nst),A(emb,h.elr),A(ctl,h.slr)]
 for o in os_:
  for g in o.param_groups:g['lr0']=g['lr']
 return os_
def sync(m):  # average gradients over ranks in one flat buffer
 g=[p.grad for p in m.parameters() if p.grad is not None]
 if not dd or not g:return
 f=torch.cat([x.reshape(-1) for x in g]);ar(f).div_(ws);o=0
 for x in g:x.copy_(f[o:o+x.numel()].view_as(x));o+=x.numel()

# ---- plain validation: rows of L tokens, each token once, the last short row padded with ignored targets
@torch.no_grad()
def plain(f,v,lt):
 N=len(v)-1;r=list(range(rk*L,N,ws*L));a=torch.zeros(3,device=dev,dtype=torch.float64)
 for i in range(0,len(r),h.eb):
  X=torch.zeros(h.eb,L,dtype=torch.int64);Y=torch.full((h.eb,L),-100)
  for j,s in enumerate(r[i:i+h.eb]):e=min(s+L,N);X[j,:e-s]=v[s:e];Y[j,:e-s]=v[s+1:e+1]
  X,Y=X.to(dev),Y.to(dev);z=f(X);k=Y>=0;n=F.cross_entropy(z[k],Y[k],reduction='none')
  a+=torch.stack((n.double().sum(),k.sum().double(),nby(lt,X[k],Y[k]).sum().double()))
 ar(a);return (a[0]/a[1]).item(),(a[0]/LN2/a[2]).item()

# ---- weight averages
class Avg:  # EMA from the first step; a plain mean (SWA) of late warm-down snapshots
 def __init__(s,m):s.e={k:p.detach().clone() for k,p in m.named_parameters()};s.w={};s.n=0
 @torch.no_grad()
 def up(s,m):
  for k,p in m.named_parameters():s.e[k].lerp_(p,1-h.ema)
 @torch.no_grad()
 def snap(s,m):
  s.n+=1
  for k,p in m.named_parameters():s.w[k]=p.detach().float().clone() if s.n==1 else s.w[k].lerp_(p,1/s.n)
 @torch.no_grad()
 def put(s,m):
  b=h.swb if s.n else 0.
  for k,p in m.named_parameters():p.copy_((1-b)*s.e[k]+b*s.w[k] if b else s.e[k])
  say(f'avg: ema {h.ema} with swa of {s.n}, share {b}')

# ---- GPTQ
def hess(m,ld,stop):
 """sum x'x at the input of every Lin, over training batches, until cb of them or the clock says stop"""
 H,hk={},[]
 def mk(n):
  def f(_,i):x=i[0].detach().reshape(-1,i[0].size(-1)).float();H[n]=torch.addmm(H[n],x.T,x) if n in H else x.T@x
  return f
 for n,k in m.named_modules():
  if isinstance(k,Lin):hk.append(k.register_forward_pre_hook(mk(n)))
 m.eval();c=0
 with torch.no_grad():
  while c<h.cb:
   x,_=ld.get(h.cbs*L*ws,L,1);m(x);c+=1
   if c%4==0 and bc(torch.tensor(int(now()>stop),device=dev)).item():break
 for k in hk:k.remove()
 for n in sorted(H):ar(H[n]).div_(c*ws)
 say(f'gptq: hessians of {len(H)} layers from {c} batches a rank');return H
def rsc(W,d,q):
 """a row's scale: the best of cgrid shrunk maxima by the error weighed with the hessian's diagonal"""
 mx=W.abs().amax(1,keepdim=True).clamp(min=1e-8);bs=mx/q;be=torch.full_like(mx,float('inf'))
 for r in torch.linspace(1.,.6,h.cgrid).tolist():
  s=(mx*r/q).half().float().clamp(min=1e-7);e=((((W/s).round().clamp(-q,q)*s-W)**2)*d).sum(1,keepdim=True);k=e<be;be=torch.where(k,e,be);bs=torch.where(k,s,bs)
 return bs
def gptq(W,H,q):
 W=W.float().clone();H=H.clone();n=W.size(1);dg=H.diagonal();dead=dg==0;H[dead,dead]=1;W[:,dead]=0
 S=rsc(W,H.diagonal()[None],q);pm=torch.argsort(H.diagonal(),descending=True);W=W[:,pm];H=H[pm][:,pm];H.diagonal().add_(h.damp*H.diagonal().mean())
 U=torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(H)),upper=True);Q=torch.zeros_like(W)
 for a in range(0,n,h.blk):
  b=min(a+h.blk,n);w=W[:,a:b].clone();E=torch.zeros_like(w);u=U[a:b,a:b]
  for i in range(b-a):
   c=(w[:,i:i+1]/S).round().clamp(-q,q);Q[:,a+i]=c[:,0];e=(w[:,i:i+1]-c*S)/u[i,i];w[:,i:]-=e@u[i:i+1,i:];E[:,i]=e[:,0]
  W[:,b:]-=E@U[a:b,b:]
 R=torch.empty_like(Q);R[:,pm]=Q;return R.to(torch.int8),S[:,0].half()
def qerr(W,Q,S,H):
 """tr(E H E') / tr(W H W'): the share of a layer's output energy that rounding loses"""
 W=W.float();E=W-Q.float()*S.float()[:,None];f=lambda A:((A@H)*A).sum();return (f(E)/f(W).clamp(min=1e-12)).item()
def codent(o):
 c=np.zeros(256,np.int64)
 for k,a in o.values():
  if k==6:c+=np.bincount(a[0].numpy().reshape(-1).astype(np.int64)+128,minlength=256)
 p=c[c>0]/max(c.sum(),1);return float(-(p*np.log2(p)).sum())
def quant(m,H,q):
 """-> {name: (kind, arrays)}; kind 6: GPTQ rows, 8: rounded rows, 16: fp16"""
 o={};er=[]
 for j,(n,p) in enumerate(m.named_parameters()):  # every rank its share, gathered below
  if j%ws!=rk:continue
  p=p.detach();b=n[:-7]
  if n.endswith('.weight') and b in H and p.numel()>8192:Q,S=gptq(p,H[b],q);o[n]=6,(Q,S);er.append((n,qerr(p,Q,S,H[b])))
  elif p.ndim==2 and p.numel()>8192:
   s=(p.abs().amax(1,keepdim=True)/h.qme).half().float().clamp(min=1e-7);o[n]=8,((p/s).round().clamp(-h.qme,h.qme).to(torch.int8),s[:,0].half())
  else:o[n]=16,(p.half(),)
 o={n:(k,tuple(t.cpu() for t in a)) for n,(k,a) in o.items()}
 if dd:
  g=[None]*ws;dist.all_gather_object(g,(o,er));o,er={},[]
  for a,b in g:o|=a;er+=b
 o={n:o[n] for n,_ in m.named_parameters()}
 for n,e in sorted(er,key=lambda x:-x[1])[:8]:say(f'  worst: {n} relative error {e:.5f}')
 say('quant: entropy of the int6 codes',f'{codent(o):.3f} bits each, mean relative error {sum(e for _,e in er)/max(len(er),1):.5f}');return o

# ---- artifact: tag byte, then compressed [u32 length | json header | raw arrays]; int8 planes first, fp16 split in byte planes
def pack(o):
 hd,q,f=[],[],[]
 for n,(k,a) in o.items():
  hd.append([n,k,[list(t.shape) for t in a]])
  for t in a:(q if t.dtype==torch.int8 else f).append(t.cpu().contiguous().numpy().reshape(-1))
 fb=np.concatenate(f).view(np.uint8).reshape(-1,2).T.tobytes();j=json.dumps(dict(t=hd,cfg={k:getattr(h,k) for k in ('dim','nl','nh','nkv','mlp','l0','l1')}),separators=(',',':')).encode()
 raw=len(j).to_bytes(4,'little')+j+np.concatenate(q).tobytes()+fb
 c=[b'L'+lzma.compress(raw,format=lzma.FORMAT_XZ,preset=9|lzma.PRESET_EXTREME)]+([b'B'+brotli.compress(raw,quality=11,lgwin=24)] if brotli else [])
 say('pack: raw',len(raw),*(f'{chr(x[0])}:{len(x)}' for x in c));return min(c,key=len)
def unpack(z):
 raw=(lzma.decompress if z[:1]==b'L' else brotli.decompress)(z[1:]);n=int.from_bytes(raw[:4],'little');hd=json.loads(raw[4:4+n])['t'];p=4+n
 nq=sum(math.prod(a[0]) for _,k,a in hd if k<16);q=np.frombuffer(raw,np.int8,nq,p);f=np.frombuffer(raw,np.uint8,offset=p+nq).reshape(2,-1).T.copy().view(np.float16).reshape(-1);i=j=0;o={}
 for n,k,a in hd:
  if k<16:
   c=math.prod(a[0]);W=torch.from_numpy(q[i:i+c].astype(np.float32)).view(a[0]);i+=c;c=a[1][0];S=torch.from_numpy(f[j:j+c].astype(np.float32));j+=c;o[n]=W*S[:,None]
  else:c=math.prod(a[0]);o[n]=torch.from_numpy(f[j:j+c].astype(np.float32)).view(a[0]);j+=c
 return o
def write(m,H,tb):
 """quantise, and once more with a coarser grid while code plus model do not fit; rank 0 packs and writes. tb: when the training clock began"""
 cz=len(src.encode('utf-8'));q=h.qm;o=quant(m,H,q);say(f'training, calibration, quantisation: {now()-tb:.1f}s of {h.tmax:.0f}s')
 while 1:
  z=pack(o) if main_ else b'';tot=cz+len(z)
  if bc(torch.tensor(int(tot<=h.lim or q<=23),device=dev)).item():break
  say(f'size: {tot} does not fit, grid {q} -> {q-2}');q-=2;o=quant(m,H,q)
 if main_:
  Path(h.out).write_bytes(z);say(f'grid {q}');say(f'model bytes: {len(z)}');say(f'code bytes: {cz}');say(f'total bytes: {tot} of {h.lim}')
  assert tot<=h.lim,'over the limit'
 if dd:dist.barrier()

# ---- what the scored text teaches besides the weights: token pair counts (all V columns) and the last continuation of a pair
class Cache:
 def __init__(s):s.C=torch.zeros(V,V,device=dev);s.t=np.full(V*V,-1,np.int64);s.c=np.zeros(V*V,np.int64);s.T=s.K=None;s.ship()
 def ship(s):s.T=torch.from_numpy(s.t).to(dev);s.K=torch.from_numpy(s.c).to(dev)
 def add(s,w):
  """w: tokens of a chunk already scored, with the two before it"""
  g=w.to(dev);s.C.mul_(h.cdec).view(-1).index_add_(0,g[1:-1]*V+g[2:],torch.ones(len(g)-2,device=dev))
  w=w.numpy();k,y=(w[:-2]*V+w[1:-1])[::-1],w[2:][::-1];u,i=np.unique(k,return_index=True);y=y[i];s.c[u]=np.where(s.t[u]==y,s.c[u]+1,0);s.t[u]=y;s.ship()
 def mix(s,lp,a,b):
  """lp: (n,V) log-probs, b: token before the target, a: the one before that -> (n,V) log-probs that sum to one"""
  p=lp.exp();r=s.C[b];n=r.sum(1,keepdim=True);H=-(p*lp).sum(1,keepdim=True)
  g=h.lam*torch.sigmoid(H-h.lh0)*(n>=h.cmin);p=(1-g)*p+g*r/n.clamp(min=1e-9)  # weight by the model's own entropy
  k=a*V+b;t=s.T[k][:,None];w=torch.exp(h.beta*s.K[k].clamp(max=h.bmax)[:,None].float()*(t>=0));t=t.clamp(min=0)
  q=p.gather(1,t);Z=1-q+q*w;p=p.scatter(1,t,q*w)/Z  # tilt the hint, renormalise
  return p.clamp(min=1e-12).log()

# ---- evaluation: spans of st targets, each seen at the end of a window of L; chunk by chunk score, then learn
def win(v,ss,N):
 """rows for spans starting at ss: inputs X, targets Y, mask M of targets to count (each target of the text in one span only)"""
 X=torch.zeros(h.eb,L,dtype=torch.int64);Y=torch.zeros(h.eb,L,dtype=torch.int64);M=torch.zeros(h.eb,L,dtype=torch.bool)
 for j,s in enumerate(ss):e=min(s+h.st,N);b=max(0,e-L);X[j,:e-b]=v[b:e];Y[j,:e-b]=v[b+1:e+1];M[j,s-b:e-b]=True
 return X.to(dev,non_blocking=True),Y.to(dev,non_blocking=True),M.to(dev,non_blocking=True)
def tparams(m):
 for p in m.parameters():p.requires_grad_(True)
 for b in list(m.b)[:h.tfz]:
  for p in b.parameters():p.requires_grad_(False)
 return [p for p in m.parameters() if p.requires_grad]
def learn(m,v,a,b,op,ps,lr):
 """SGD on the chunk [a,b), all of whose targets have been counted"""
 m.train();n=(b-a)//L;[g.update(lr=lr) for g in op.param_groups]
 for _ in range(h.tep):
  for i in range(0,n,ws):
   op.zero_grad(set_to_none=False);j=i+rk;c=torch.tensor(float(min(ws,n-i)),device=dev)
   if j<n:s=a+j*L;w=v[s:s+L+1].to(dev);m(w[None,:-1],w[None,1:]).backward()
   gs=[p.grad for p in ps if p.grad is not None] if j<n else [torch.zeros_like(p) for p in ps]
   if dd:
    f=torch.cat([g.reshape(-1) for g in gs]);ar(f).div_(c);o=0
    for p,g in zip(ps,gs):p.grad=f[o:o+g.numel()].view_as(g).clone();o+=g.numel()
   torch.nn.utils.clip_grad_norm_(ps,h.tgc);op.step()
def evaluate(m,f,v,lt,ttt,t0,tag):
 N=len(v)-1;nc=-(-N//h.tc);A=torch.zeros(3,device=dev,dtype=torch.float64);ca=Cache() if h.cache else None;go=ttt
 ps=tparams(m);op=torch.optim.SGD(ps,lr=h.tlr,momentum=h.tmom)
 for c in range(nc):
  a,b=c*h.tc,min((c+1)*h.tc,N);ss=list(range(a,b,h.st))[rk::ws];m.eval()
  with torch.no_grad():
   for i in range(0,len(ss),h.eb):
    X,Y,M=win(v,ss[i:i+h.eb],N);z=f(X)[M].float()/h.tau;lp=F.log_softmax(z,-1);x,y=X[M],Y[M]
    if ca:lp=ca.mix(lp,F.pad(X[:,:-1],(1,0))[M],x)
    nl=-lp.gather(1,y[:,None])[:,0];A+=torch.stack((nl.double().sum(),M.sum().double(),nby(lt,x,y).sum().double()))
  if ca:ca.add(v[max(a-1,0):b+1])
  if go and c<nc-1:
   go=not bc(torch.tensor(int(now()-t0>h.te),device=dev)).item()  # out of time: go on scoring, stop learning
   if go:learn(m,v,a,b,op,ps,h.tlr*.5*(1+math.cos(math.pi*c/nc)))
  if c%100==0:say(f'{tag} chunk {c}/{nc} running {(A[0]/LN2/A[2].clamp(min=1)).item():.5f} (rank 0) {now()-t0:.0f}s')
 ar(A);assert int(A[1])==N,(int(A[1]),N)
 return (A[0]/A[1]).item(),(A[0]/LN2/A[2]).item(),int(A[1]),int(A[2])

# ---- the other way: low-rank adapters, fresh for every document, score a piece and only then learn from it (DTTT=1; too slow for the whole split)
class Lora(nn.Module):
 def __init__(s,l):super().__init__();o,i=l.weight.shape;s.l=l;s.A=nn.Parameter(torch.empty(h.dr,i,device=dev));s.B=nn.Parameter(torch.zeros(o,h.dr,device=dev));s.reset()
 @torch.no_grad()
 def reset(s):nn.init.normal_(s.A,std=s.A.size(1)**-.5);s.B.zero_()
 def forward(s,x):return s.l(x)+F.linear(F.linear(x,s.A.to(x.dtype)),s.B.to(x.dtype))
def wrap(m):
 """adapters on query and value of the last dl blocks; everything else stays still"""
 for p in m.parameters():p.requires_grad_(False)
 ad=[]
 for b in list(m.b)[-h.dl:]:
  for k in ('q','v'):a=Lora(getattr(b.a,k));setattr(b.a,k,a);ad.append(a)
 return ad
def docs(v):
 """[start, end) of every document; the target after a document's last token is the next one's BOS"""
 N=len(v)-1;b=(v[:N]==h.bos).nonzero()[:,0].tolist();b=b if b and b[0]==0 else [0,*b];return [*zip(b,b[1:]+[N])]
def bydoc(m,v,lt,t0):
 ad=wrap(m);ps=[p for a in ad for p in (a.A,a.B)];A=torch.zeros(3,device=dev,dtype=torch.float64);dl=docs(v)[rk::ws];torch.manual_seed(h.seed+rk)
 for k,(s,e) in enumerate(dl):
  [a.reset() for a in ad];op=torch.optim.Adam(ps,lr=h.dlr,betas=(.9,.95))
  for a in range(s,e,h.dc):
   b=min(a+h.dc,e);c=max(s,b-L);w=v[c:b+1].to(dev);x,y=w[None,:-1],w[1:];m.eval()
   with torch.no_grad():
    lp=F.log_softmax(m(x)[0].float()/h.tau,-1)[a-c:];x_,y_=x[0,a-c:],y[a-c:];nl=-lp.gather(1,y_[:,None])
    A+=torch.stack((nl.double().sum(),torch.tensor(float(b-a),device=dev,dtype=torch.float64),nby(lt,x_,y_).sum().double()))
   if b<e:  # the piece is counted: learn from it before the next
    m.train();op.zero_grad(set_to_none=True);t=y.clone();t[:a-c]=-100;m(x,t[None]).backward();op.step()
  if k%500==0:say(f'doc {k}/{len(dl)} running {(A[0]/LN2/A[2].clamp(min=1)).item():.5f} (rank 0) {now()-t0:.0f}s')
 n,k,y=ar(A).tolist();assert int(k)==len(v)-1,(k,len(v)-1)
 return n/k,n/LN2/y

# ---- self-checks on random tokens (CHK=1) and a look at what it writes (SMP=1)
@torch.no_grad()
def check(m):
 g=torch.Generator().manual_seed(1);w=torch.randint(0,V,(4097,),generator=g);ca=Cache();ca.add(w)
 lp=F.log_softmax(torch.randn(512,V,generator=g).to(dev),-1);a,b=(torch.randint(0,V,(512,),generator=g).to(dev) for _ in '12')
 d=(ca.mix(lp,a,b).double().exp().sum(1)-1).abs().max().item();say(f'check: a mixed row sums to one within {d:.1e}')
 x=torch.randint(0,V,(1,L),generator=g).to(dev);y=x.clone();y[0,L//2:]=torch.randint(0,V,(L-L//2,),generator=g).to(dev)
 m.eval();d=(m(x)[0,:L//2]-m(y)[0,:L//2]).abs().max().item();say(f'check: a changed future moves the past by {d:.1e}')
 N=5*h.st+7;v=torch.randint(0,V,(N+1,),generator=g);c=torch.zeros(N,dtype=torch.int64)
 for s in range(0,N,h.st):_,Y,M=win(v,[s],N);k=int(M.sum());assert (Y[M].cpu()==v[s+1:s+1+k]).all();c[s:s+k]+=1
 say('check: every target in',f'{c.min().item()}..{c.max().item()} spans')
 r={n:(16,(torch.randn(3,5,generator=g).half(),)) for n in 'ab'}|{'q':(8,(torch.randint(-9,9,(4,6),generator=g).to(torch.int8),torch.ones(4).half()))}
 u=unpack(pack(r));say('check: pack and unpack agree',all(torch.equal(u[n],a[0].float()) for n,(k,a) in r.items()))
@torch.no_grad()
def sample(m,sp,n=96,T=.8):
 t=torch.tensor([[h.bos]],device=dev);g=torch.Generator(device=dev).manual_seed(h.seed);m.eval()
 for _ in range(n):p=F.softmax(m(t[:,-L:])[:,-1].float()/T,-1);t=torch.cat((t,torch.multinomial(p,1,generator=g)),1)
 say('sample:',sp.decode(t[0,1:].tolist()).replace('\n',' / '))

# ---- training
def lrs(i,el,cap):
 """scale of the learning rates: flat, then linear warm-down over the last wd_it steps as the clock foresees them"""
 per=el/max(i,1);w=h.wd_it*per;left=max(cap-el,0.);return min(1.,left/w) if w>0 and i>10 else 1.
def warmup(m,f,ga):
 """compile both depths and the optimizers' kernels on random tokens; put everything back"""
 st={k:t.clone() for k,t in m.state_dict().items()};g=torch.Generator(device=dev).manual_seed(h.seed);n=h.btok//(ws*ga*L);os_=groups(m)
 for i in range(h.warm):
  m.lp=i>=h.warm//2;t=torch.randint(0,V,(n,L+1),device=dev,generator=g);f(t[:,:-1].contiguous(),t[:,1:].contiguous()).backward();sync(m)
  for o in os_:o.step();o.zero_grad(set_to_none=True)
 with torch.no_grad():
  for lp in (False,True):m.lp=lp;f(torch.zeros(h.eb,L,dtype=torch.int64,device=dev))
 m.lp=False;m.load_state_dict(st);del os_
def train(m,f,v,lt):
 ga=8//ws;warmup(m,f,ga);os_=groups(m);av=Avg(m);ld=Load(trf());cap=h.tmax-h.tres;T=0.;i=0;t0=now()
 while 1:
  el=T+now()-t0;stop=bc(torch.tensor(int(el>=cap or i>=h.iters),device=dev)).item()
  if i and i%h.vev==0 and not stop:
   T+=now()-t0;m.eval();l,b=plain(f,v,lt);m.train();say(f'step {i} val_loss {l:.4f} val_bpb {b:.4f} train_time {T:.1f}s');t0=now()  # seen, not used
  if stop:break
  s=lrs(i,el,cap);m.lp=m.lp or el>=h.lat*cap;r=min(i/h.mmw,1.)
  for _ in range(ga):x,y=ld.get(h.btok,L,ga);l=f(x,y);(l/ga).backward()
  sync(m);torch.nn.utils.clip_grad_norm_(m.parameters(),h.gc)
  for o in os_:
   for g in o.param_groups:
    g['lr']=g['lr0']*s
    if 'mom' in g:g['mom']=h.mm0+(h.mm-h.mm0)*r
   o.step();o.zero_grad(set_to_none=True)
  i+=1;av.up(m)
  if s<h.swf and i%h.swe==0:av.snap(m)
  if i<=5 or i%h.lev==0:say(f'step {i} loss {l.item():.4f} lr {s:.3f} loop {int(m.lp)} t {T+now()-t0:.1f}s')
 say(f'trained {i} steps in {T+now()-t0:.1f}s of {h.tmax:.0f}s, peak {torch.cuda.max_memory_allocated()>>20} MiB')
 m.lp=True;av.put(m)
 H=hess(m,ld,now()+h.tcal);say(f'training and calibration: {T+now()-t0:.1f}s');return H,t0-T
def fresh():return GPT().to(dev)
def twin(m):c=fresh();c.load_state_dict(m.state_dict());c.lp=m.lp;return c
def main():
 setup();sp=spm.SentencePieceProcessor(model_file=h.tok);assert sp.vocab_size()==V,(sp.vocab_size(),V)
 lt=luts(sp);v=vtok();say(f'train shards {len(trf())}, val tokens {len(v)-1}')
 m=fresh();f=torch.compile(m,dynamic=False);say('params',sum(p.numel() for p in m.parameters()))
 by={k:sum(p.numel() for o in o_.param_groups for p in o['params']) for k,o_ in zip(('muon','embeddings','small'),groups(m))};say('by optimizer',by)
 if h.chk:check(m)
 H,tb=train(m,f,v,lt)
 if h.raw and main_:torch.save(m.state_dict(),h.raw)  # for looking at, never read back
 write(m,H,tb);del m,f,H;torch.cuda.empty_cache();torch._dynamo.reset()
 # from here on only the artifact and the validation text are read
 t0=now();m=fresh();m.load_state_dict(unpack(Path(h.out).read_bytes()));m.lp=True;m.eval();f=torch.compile(m,dynamic=False)
 l,b=plain(f,v,lt);say(f'roundtrip val_loss {l:.4f} val_bpb {b:.4f} t {now()-t0:.0f}s')
 if h.slide:say('sliding without learning',evaluate(m,f,v,lt,0,t0,'slide'))
 if h.smp and main_:sample(m,sp)
 if h.dttt:say('document-wise, on a copy',bydoc(twin(m),v,lt,t0))
 l,b,n,y=evaluate(m,f,v,lt,h.ttt,t0,'ttt');el=now()-t0
 say(f'tokens {n} bytes {y} eval_time {el:.1f}s');say(f'final_exact val_loss:{l:.8f} val_bpb:{b:.8f}')
 if dd:dist.destroy_process_group()
if __name__=='__main__':main()
