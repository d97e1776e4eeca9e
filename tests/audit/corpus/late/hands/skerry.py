import torch,os,math as M,time as Z,glob as G,random as R,io,sys,copy,uuid,lzma,subprocess as SP,numpy as np,sentencepiece as spm,torch.distributed as D,torch.nn.functional as F
from pathlib import Path as P
from collections import defaultdict as DD
from torch import nn,Tensor as T
from torch.nn.parallel import DistributedDataParallel as DP
try:import brotli as BR
except ImportError:BR=None
try:from flash_attn_interface import flash_attn_func as FA
except ImportError:FA=None
E=os.environ.get
class H:
 data_dir=E('DATA_DIR','./data/');run_id=E('RUN_ID',str(uuid.uuid4()));rank=int(E('RANK','0'));world=int(E('WORLD_SIZE','1'));local=int(E('LOCAL_RANK','0'));comp=E('COMPRESSOR','brotli')
for t,s in((int,'seed=1337 vocab_size=8192 num_layers=11 model_dim=512 num_heads=8 num_kv_heads=4 xsa_last_n=11 rope_dims=16 train_seq_len=2048 eval_seq_len=2048 train_batch_tokens=786432 val_batch_tokens=524288 iterations=20000 warmup_steps=20 val_loss_every=4000 train_log_every=500 muon_backend_steps=5 muon_warmup_steps=1500 matrix_bits=6 embed_bits=8 gptq_calibration_batches=64 eval_stride=64 ttt_epochs=3 ttt_chunk=32768 ttt_batch_seqs=32 ttt_freeze_blocks=0 loop_start=4 loop_end=5 num_loops=2 parallel_from=7 bigram_buckets=0 ve_dim=0 smear=0 swa_every=50 bos_id=1'),(float,'mlp_mult=4 qk_gain=5.0 logit_softcap=30 rope_base=10000 max_wallclock_seconds=600 gptq_reserve_seconds=12 warmdown_frac=0.72 min_lr=0 loop_at=0.35 tied_embed_lr=0.03 matrix_lr=0.022 scalar_lr=0.02 muon_momentum=0.99 muon_momentum_start=0.92 muon_wd=0.095 embed_wd=0.085 adam_wd=0.02 beta1=0.9 beta2=0.95 adam_eps=1e-8 grad_clip=0.3 ema_decay=0.9965 swa_frac=0 qat_at=0 matrix_clip=12.85 embed_clip=20.0 ttt_lr=0.005 ttt_momentum=0.9 ttt_grad_clip=1.0 tied_init_std=0.005'),(lambda v:v not in('','0'),'sliding_window=1 ttt=1 skip_gates=1 ln_scale=1 muon_row_norm=1 eval_only= log_calib= sentry=')):
 for q in s.split():k,v=q.split('=');setattr(H,k,t(E(k.upper(),v)))
for k,v in dict(datasets=f'{H.data_dir}datasets/fineweb10B_sp{H.vocab_size}',tok=f'{H.data_dir}tokenizers/fineweb_{H.vocab_size}_bpe.model',accum=8//H.world,main=H.rank<1,model_path='final_model.pt',quant_path='final_model.int6.ptz',logfile=f'logs/{H.run_id}.txt').items():setattr(H,k,v)
H.ve_layers=[int(x)for x in E('VE_LAYERS','9,10').split(',')if x];H.loader=E('LOADER','shuffled');H.ttt_opt=E('TTT_OPT','sgd')
H.train_files,H.val_files=(f'{H.datasets}/fineweb_{x}_*.bin'for x in('train','val'))
def lg(m,c=True):
 if H.main:
  c and print(m)
  with open(H.logfile,'a',encoding='utf-8')as f:print(m,file=f)
def ld(f):
 h=np.fromfile(f,'<i4',256);assert h.size==256 and(h[0],h[1])==(20240520,1),f'unexpected shard header for {f}'
 n=int(h[2]);assert P(f).stat().st_size==1024+2*n,f'shard size mismatch for {f}'
 return torch.from_numpy(np.fromfile(f,'<u2',n,offset=1024).astype(np.uint16,copy=False))
def lv(g,S):
 if not(f:=sorted(G.glob(g))):raise FileNotFoundError(g)
 t=torch.cat([*map(ld,f)]).contiguous();assert(u:=(t.numel()-1)//S*S)>0;return t[:u+1]
class VD:
 def __init__(s,dv):
  s.sp=spm.SentencePieceProcessor(model_file=H.tok);assert int(s.sp.vocab_size())==H.vocab_size,f'VOCAB_SIZE={H.vocab_size} does not match tokenizer';s.v=lv(H.val_files,H.eval_seq_len);s.b,s.l,s.u=lut(s.sp,H.vocab_size,dv)
def lut(p,V,dv):
 n=max(N:=int(p.vocab_size()),V);b,l,u=np.zeros(n,np.int16),np.zeros(n,np.bool_),np.ones(n,np.bool_)
 for i in range(N):
  if p.is_control(i)or p.is_unknown(i)or p.is_unused(i):continue
  u[i]=False
  if p.is_byte(i):b[i]=1;continue
  w=p.id_to_piece(i)
  if w.startswith('\u2581'):l[i]=True;w=w[1:]
  b[i]=len(w.encode('utf-8'))
 return(torch.tensor(b,dtype=torch.int16,device=dv),*(torch.tensor(x,dtype=torch.bool,device=dv)for x in(l,u)))
class SL:
 def __init__(s,g,dv):
  if not(f:=[P(x)for x in sorted(G.glob(g))]):raise FileNotFoundError(g)
  s.f=f[H.rank::H.world];s.d=dv;s.S=H.train_seq_len;s.g=np.random.Generator(np.random.PCG64(H.rank));s.n=[int(np.fromfile(x,'<i4',3)[2])for x in s.f];s.m={};s.q=[[]for _ in s.f];[s.rs(i)for i in range(len(s.f))]
 def mm(s,i):
  if i not in s.m:s.m[i]=np.memmap(s.f[i],mode='r',dtype='<u2',offset=1024,shape=(s.n[i],))
  return s.m[i]
 def rs(s,i):x=min(s.S-1,max(0,s.n[i]-s.S-1));p=int(s.g.integers(x+1))if x>0 else 0;k=(s.n[i]-1-p)//s.S;s.q[i]=(p+s.g.permutation(k)*s.S).tolist()
 def nb(s,gt,ga):
  B=gt//(H.world*ga)//s.S;w=np.array([len(a)for a in s.q],dtype=np.float64);x=torch.empty(B,s.S,dtype=torch.int64);y=x.clone()
  for j in range(B):
   if(W:=w.sum())<=0:[s.rs(i)for i in range(len(s.f))];w=np.array([len(a)for a in s.q],dtype=np.float64);W=w.sum()
   i=int(s.g.choice(len(s.f),p=w/W));o=s.q[i].pop();w[i]-=1;z=torch.as_tensor(np.array(s.mm(i)[o:o+s.S+1],dtype=np.int64));x[j],y[j]=z[:-1],z[1:]
  return x.to(s.d,non_blocking=True),y.to(s.d,non_blocking=True)
class TS:
 def __init__(s,g,dv):
  if not(f:=sorted(G.glob(g))):raise FileNotFoundError(g)
  s.f,s.i,s.p,s.d=f,0,0,dv;s.t=ld(f[0])
 def tk(s,n):
  o=[]
  while n>0:
   if(a:=s.t.numel()-s.p)<=0:s.i=(s.i+1)%len(s.f);s.t=ld(s.f[s.i]);s.p=0;continue
   k=min(n,a);o.append(s.t[s.p:s.p+k]);s.p+=k;n-=k
  return o[0]if len(o)<2 else torch.cat(o)
 def nb(s,gt,ga):S=H.train_seq_len;n=gt//(H.world*ga)//S*S;c=s.tk((n+1)*H.world);z=c[H.rank*(n+1):(H.rank+1)*(n+1)].to(torch.int64);return z[:-1].view(-1,S).to(s.d,non_blocking=True),z[1:].view(-1,S).to(s.d,non_blocking=True)
DL=lambda g,dv:(SL if H.loader=='shuffled'else TS)(g,dv)
rn=lambda x,e=None:F.rms_norm(x,(x.size(-1),),eps=e)
class C(nn.Linear):
 qa=False
 def forward(s,x):
  w=s.weight
  if C.qa and s.training and w.numel()>65536:
   with torch.no_grad():r=2**(H.matrix_bits-1)-1;k=(H.matrix_clip*w.float().std(1,keepdim=True)/r).clamp_min(1e-10);d=torch.clamp(torch.round(w.float()/k),-r,r)*k-w
   w=w+d.to(w.dtype)
  return F.linear(x,w.to(x.dtype),None if s.bias is None else s.bias.to(x.dtype))
class RO(nn.Module):
 def __init__(s,d,b,L,r):super().__init__();s.r=r or d;s.b,s.L=b,L;s.register_buffer('f',1/b**(torch.arange(0,s.r,2,dtype=torch.float32)/s.r),persistent=False);s.k=s.c=s.s=None
 def forward(s,n,dv,dt):
  if s.k!=(n,dv):
   if n>s.L:f=1/(s.b*(n/s.L)**(s.r/(s.r-2)))**(torch.arange(0,s.r,2,dtype=torch.float32,device=dv)/s.r)
   else:f=s.f.to(dv)
   q=torch.outer(torch.arange(n,device=dv,dtype=f.dtype),f);s.c,s.s=q.cos()[None,:,None],q.sin()[None,:,None];s.k=n,dv
  return s.c.to(dt),s.s.to(dt)
def ar(x,c,s,r):
 if r<x.size(-1):x,p=x[...,:r],x[...,r:]
 else:p=None
 a,b=x.chunk(2,-1);x=torch.cat((a*c+b*s,b*c-a*s),-1);return x if p is None else torch.cat((x,p),-1)
def at(q,k,v):
 if FA is not None:return FA(q,k,v,causal=True)
 return F.scaled_dot_product_attention(*(z.transpose(1,2)for z in(q,k,v)),is_causal=True,enable_gqa=q.size(2)!=k.size(2)).transpose(1,2)
class A(nn.Module):
 def __init__(s):
  super().__init__();d,s.h,s.g=H.model_dim,H.num_heads,H.num_kv_heads;s.e=d//s.h;s.xs=False
  for n,o in zip('qkvo',(d,s.g*s.e,s.g*s.e,d)):setattr(s,n,C(d,o,bias=False))
  s.o.zi=True;s.qg=nn.Parameter(torch.full((s.h,),H.qk_gain,dtype=torch.float32));s.ro=RO(s.e,H.rope_base,H.train_seq_len,H.rope_dims)
 def forward(s,x,ve=None):
  b,n,d=x.shape;q,k,v=(getattr(s,m)(x).reshape(b,n,-1,s.e)for m in'qkv');q,k=rn(q),rn(k);c,i=s.ro(n,x.device,q.dtype);q,k=ar(q,c,i,s.ro.r),ar(k,c,i,s.ro.r);v=v if ve is None else v+ve.view_as(v);y=at(q*s.qg.to(q.dtype)[None,None,:,None],k,v)
  if s.xs:w=F.normalize(v,dim=-1).unsqueeze(-2);z=y.reshape(b,n,s.g,s.h//s.g,s.e);y=(z-(z*w).sum(-1,keepdim=True)*w).reshape(b,n,s.h,s.e)
  return s.o(y.reshape(b,n,d))
class FF(nn.Module):
 def __init__(s):super().__init__();h=int(H.mlp_mult*H.model_dim);s.u,s.w=C(H.model_dim,h,bias=False),C(h,H.model_dim,bias=False);s.w.zi=True
 def forward(s,x):return s.w(F.leaky_relu(s.u(x),.5).square())
class BG(nn.Module):
 def __init__(s,n,d=128):super().__init__();s.n=n;s.e,s.p=nn.Embedding(n,d),C(d,H.model_dim,bias=False);nn.init.zeros_(s.e.weight);s.c=nn.Parameter(torch.tensor(.05))
 def forward(s,t):a=t.int();h=torch.full_like(a,s.n-1);h[...,1:]=torch.bitwise_xor(36313*a[...,1:],27191*a[...,:-1])%(s.n-1);return s.p(s.e(h))*s.c
class VE(nn.Module):
 def __init__(s):super().__init__();s.e,s.p=nn.Embedding(H.vocab_size,H.ve_dim),C(H.ve_dim,H.num_kv_heads*(H.model_dim//H.num_heads),bias=False);nn.init.normal_(s.e.weight,std=.01);s.c=nn.Parameter(torch.tensor(.1));s.ls=nn.Parameter(torch.ones(len(H.ve_layers)))
 def forward(s,t):return s.p(s.e(t))*s.c
class SM(nn.Module):
 def __init__(s):super().__init__();s.ga=nn.Parameter(torch.zeros(H.model_dim))
 def forward(s,x,t):g=torch.sigmoid(s.ga.to(x.dtype))*(t[:,1:]!=H.bos_id).unsqueeze(-1);return torch.cat((x[:,:1],torch.lerp(x[:,1:],x[:,:-1],g*.5)),1)
class BK(nn.Module):
 def __init__(s,i):super().__init__();d=H.model_dim;s.a,s.m=A(),FF();s.f=1/M.sqrt(i+1)if H.ln_scale else 1.;s.sa,s.sm=(nn.Parameter(torch.ones(d))for _ in'ab');s.mx=nn.Parameter(torch.stack((torch.ones(d),torch.zeros(d))));s.pl=i>=H.parallel_from
 def forward(s,x,x0,ve=None):
  m=s.mx.to(x.dtype);x=m[0]*x+m[1]*x0;y=s.sa.to(x.dtype)*s.a(rn(x)*s.f,ve)
  if s.pl:return x+y+s.sm.to(x.dtype)*s.m(rn(x)*s.f)
  x=x+y;return x+s.sm.to(x.dtype)*s.m(rn(x)*s.f)
class GP(nn.Module):
 def __init__(s):
  super().__init__();d=H.model_dim;s.te=nn.Embedding(H.vocab_size,d);s.bg,s.ve,s.sm=BG(H.bigram_buckets)if H.bigram_buckets else None,VE()if H.ve_dim else None,SM()if H.smear else None;s.bl=nn.ModuleList(map(BK,range(H.num_layers)));s.lp=False;nn.init.normal_(s.te.weight,std=H.tied_init_std)
  a=[*range(H.num_layers)];l=a[:H.loop_start]+a[H.loop_start:H.loop_end+1]*(H.num_loops+1)+a[H.loop_end+1:];s.od=[(z[:(n:=len(z)//2)],z[n:])for z in(a,l)];k=max(min(len(e),len(f))for e,f in s.od);s.sw=nn.Parameter(torch.ones(k,d));s.sg=nn.Parameter(torch.zeros(k,d))if H.skip_gates else None
  for i in range(max(0,H.num_layers-H.xsa_last_n),H.num_layers):s.bl[i].a.xs=True
  for m in s.modules():
   if isinstance(m,nn.Linear):(nn.init.zeros_ if getattr(m,'zi',0)else nn.init.orthogonal_)(m.weight)
 def fl(s,t):
  x=s.te(t)
  if s.bg is not None:x=x+s.bg(t)
  x=rn(x)
  if s.sm is not None:x=s.sm(x,t)
  w=None if s.ve is None else s.ve(t);vv=lambda i:None if w is None or i not in H.ve_layers else w*s.ve.ls[H.ve_layers.index(i)].to(w.dtype);x0=x;st=[];e,f=s.od[int(s.lp)]
  for i in e:x=s.bl[i](x,x0,vv(i));st.append(x)
  for j,i in enumerate(f):
   if st and j<len(s.sw):
    k=s.sw[j].to(x.dtype)*st.pop();x=x+k if s.sg is None else torch.lerp(k,x,torch.sigmoid(s.sg[j].to(x.dtype)))
   x=s.bl[i](x,x0,vv(i))
  return H.logit_softcap*torch.tanh(F.linear(rn(x),s.te.weight.to(x.dtype))/H.logit_softcap)
 def forward(s,t,y):return F.cross_entropy(s.fl(t).flatten(0,1).float(),y.flatten())
@torch.compile
def ns(g,n=5,e=1e-7):
 X=g.bfloat16();X/=X.norm()+e
 if(tr:=g.size(0)>g.size(1)):X=X.T
 for _ in range(n):A_=X@X.T;X=3.4445*X+(-4.775*A_+2.0315*A_@A_)@X
 return X.T if tr else X
class MU(torch.optim.Optimizer):
 def __init__(s,p,lr,m,n,wd=0.,rw=False):super().__init__(p,dict(lr=lr,momentum=m,n=n,wd=wd,rw=rw))
 @torch.no_grad()
 def step(s,closure=None):
  w,r=H.world,H.rank
  for g in s.param_groups:
   if not(p:=g['params']):continue
   u=torch.zeros(sum(x.numel()for x in p),device=p[0].device,dtype=torch.bfloat16);o=0
   for i,x in enumerate(p):
    if i%w==r and x.grad is not None:
     a=x.grad;st=s.state[x];b=st.setdefault('b',torch.zeros_like(a));b.mul_(g['momentum']).add_(a);a=a.add(b,alpha=g['momentum'])
     if g['rw']:a=a/a.float().norm(dim=-1,keepdim=True).clamp_min(1e-7).to(a.dtype)
     a=ns(a,g['n']);a=a*max(1,a.size(0)/a.size(1))**.5;u[o:o+x.numel()]=a.reshape(-1)
    o+=x.numel()
   w>1 and D.all_reduce(u);o=0
   for x in p:
    if g['wd']>0:x.mul_(1-g['lr']*g['wd'])
    x.add_(u[o:o+x.numel()].view_as(x).to(x.dtype),alpha=-g['lr']);o+=x.numel()
CT='sa','sm','mx','qg','sw','sg','bg.c'
ic=lambda n,p:p.ndim<2 or n.split('.')[-1]in CT or n.endswith('bg.c')
class OP:
 def __init__(s,m):
  k=dict(betas=(H.beta1,H.beta2),eps=H.adam_eps,fused=True);q=[*m.bl.named_parameters()];mt=[p for n,p in q if not ic(n,p)];sc=[p for n,p in q if ic(n,p)]+[x for x in(m.sw,m.sg)if x is not None];em=[m.te.weight]
  if m.bg is not None:em+=[m.bg.e.weight];mt+=[m.bg.p.weight];sc+=[m.bg.c]
  if m.ve is not None:em+=[m.ve.e.weight];mt+=[m.ve.p.weight];sc+=[m.ve.c,m.ve.ls]
  if m.sm is not None:sc+=[m.sm.ga]
  s.t=torch.optim.AdamW([dict(params=em,lr=H.tied_embed_lr,b=H.tied_embed_lr)],weight_decay=H.embed_wd,**k);s.m=MU([dict(params=mt,b=H.matrix_lr)],H.matrix_lr,H.muon_momentum,H.muon_backend_steps,H.muon_wd,H.muon_row_norm);s.s=torch.optim.AdamW([dict(params=sc,lr=H.scalar_lr,b=H.scalar_lr)],weight_decay=H.adam_wd,**k);s.a=[s.t,s.m,s.s]
 def zg(s):[o.zero_grad(set_to_none=True)for o in s.a]
 def go(s,c,mo):
  for o in s.a:
   for g in o.param_groups:g['lr']=g['b']*c
  for g in s.m.param_groups:g['momentum']=mo
  [o.step()for o in s.a];s.zg()
def fp(m):
 [x.float()for x in m.modules()if isinstance(x,C)]
 for n,p in m.named_parameters():
  if ic(n,p)and p.dtype!=torch.float32:p.data=p.data.float()
def bp(L,n,B):ls=(L/n).item();return ls,ls/M.log(2)*(n.item()/B.item())
def by(V,x,y):b=V.b[y].to(torch.float64);return b+(V.l[y]&~V.u[x]).to(torch.float64)
def rd(*z):
 if D.is_available()and D.is_initialized():[D.all_reduce(x,op=D.ReduceOp.SUM)for x in z]
 return z
Q=lambda dv:[torch.zeros((),device=dv,dtype=torch.float64)for _ in'lnb']
def ev(V,m,dv):
 S=H.eval_seq_len;B=max(1,H.val_batch_tokens//(H.world*H.accum*S));N=(V.v.numel()-1)//S;a,z=N*H.rank//H.world,N*(H.rank+1)//H.world;l,n,b=Q(dv);m.eval()
 with torch.inference_mode():
  for i in range(a,z,B):
   j=min(i+B,z);c=V.v[i*S:j*S+1].to(dv,torch.int64,non_blocking=True);x,y=c[:-1].view(-1,S),c[1:].view(-1,S)
   with torch.autocast('cuda',torch.bfloat16):q=m(x,y).detach()
   k=float(y.numel());l+=q.double()*k;n+=k;b+=by(V,x,y).sum()
 m.train();return bp(*rd(l,n,b))
def sc(V,f,dv,W,S,K,acc,B=32):
 l,n,b=acc;X=S-K;E_=V.v.numel()-1
 with torch.no_grad():
  for i in range(0,len(W),B):
   w=W[i:i+B];k=len(w);x=torch.zeros(k,S,dtype=torch.int64,device=dv);y=x.clone();ln=[]
   for j,o in enumerate(w):e=min(o+S,E_);ln.append(e-o);c=V.v[o:e+1].to(dv,torch.int64);x[j,:e-o],y[j,:e-o]=c[:-1],c[1:]
   with torch.autocast('cuda',torch.bfloat16):z=f(x)
   q=F.cross_entropy(z.flatten(0,1).float(),y.flatten(),reduction='none').view(k,S)
   for j,o in enumerate(w):a=X if o else 0;e=ln[j];l+=q[j,a:e].double().sum();n+=e-a;b+=by(V,x[j,a:e],y[j,a:e]).sum()
ws=lambda V,S,K:[o for o in range(0,V.v.numel()-1,K)if o+S-K<V.v.numel()-1]
def sw(V,m,dv):
 S,K=H.eval_seq_len,H.eval_stride;f=torch.compile(m.fl,dynamic=False,fullgraph=True);m.eval();W=ws(V,S,K);acc=Q(dv);sc(V,f,dv,W[len(W)*H.rank//H.world:len(W)*(H.rank+1)//H.world],S,K,acc);m.train();return bp(*rd(*acc))
def tt(V,m,dv):
 S,K,c=H.eval_seq_len,H.eval_stride,H.ttt_chunk;N=V.v.numel()-1;U=(N+c-1)//c;cw=[[]for _ in range(U)];r,w=H.rank,H.world
 for o in ws(V,S,K):cw[min((o+S-K if o else 0)//c,U-1)].append(o)
 lg(f"ttt:start chunks={U} ttt_lr={H.ttt_lr} ttt_epochs={H.ttt_epochs}");f=torch.compile(m.fl,dynamic=False,fullgraph=True);ps=[]
 for n,p in m.named_parameters():
  p.requires_grad_(g:=not any(n.startswith(f'bl.{i}.')for i in range(H.ttt_freeze_blocks)));g and ps.append(p)
 o=torch.optim.SGD(ps,lr=H.ttt_lr,momentum=H.ttt_momentum)if H.ttt_opt=='sgd'else torch.optim.AdamW(ps,lr=H.ttt_lr,weight_decay=0.,betas=(.9,.95),fused=True);acc=Q(dv);t0=Z.perf_counter()
 for u,W in enumerate(cw):
  a,e=u*c,min(u*c+c,N);m.eval();sc(V,f,dv,W[len(W)*r//w:len(W)*(r+1)//w],S,K,acc,H.ttt_batch_seqs)
  if u<U-1 and H.ttt_epochs>0 and(k:=(e-a)//S):
   m.train();h=H.ttt_lr*.5*(1+M.cos(M.pi*u/max(U-1,1)));[g.update(lr=h)for g in o.param_groups];i0,i1=k*r//w,k*(r+1)//w
   for _ in range(H.ttt_epochs):
    for i in range(i0,i1,max(1,H.ttt_batch_seqs//w)):
     j=min(i+max(1,H.ttt_batch_seqs//w),i1);z=V.v[a+i*S:a+j*S+1].to(dv,torch.int64);o.zero_grad(set_to_none=True)
     with torch.autocast('cuda',torch.bfloat16):L=m(z[:-1].view(-1,S),z[1:].view(-1,S))
     L.backward();w>1 and[D.all_reduce(p.grad,op=D.ReduceOp.AVG)for p in ps if p.grad is not None];nn.utils.clip_grad_norm_(ps,H.ttt_grad_clip);o.step()
  if H.main and(u%100==0 or u==U-1):lg(f"  ttt_chunk [{u+1}/{U}] bpb={acc[0].item()/M.log(2)/max(acc[2].item(),1):.6f} time={Z.perf_counter()-t0:.1f}s")
 for p in m.parameters():p.requires_grad_(True)
 m.eval();return bp(*rd(*acc))
def hs(m,dl,dv,n):
 h,hk={},[]
 def mk(k,inp):
  def g(mo,x,y):
   x=(x[0]if inp else rn(y)).detach().float().flatten(0,-2)
   if k not in h:h[k]=torch.zeros(x.size(1),x.size(1),device=dv)
   h[k].addmm_(x.T,x)
  return g
 for k,mo in m.named_modules():
  if isinstance(mo,C)and mo.weight.numel()>65536:hk.append(mo.register_forward_hook(mk(k+'.weight',True)))
 hk.append(m.bl[-1].register_forward_hook(mk('te.weight',False)));m.eval()
 with torch.no_grad(),torch.autocast('cuda',torch.bfloat16):
  for i in range(n):x,_=dl.nb(H.train_batch_tokens,H.accum);m.fl(x);H.log_calib and i%16<1 and lg(f'gptq:calib {i}/{n}',False)
 [x.remove()for x in hk];return{k:(v/n).cpu()for k,v in h.items()}
def gq(w,h,cs,cr,bs=128):
 W=w.float().clone();r,c=W.shape;h=h.float().to(W.device).clone();dd=torch.diag(h)==0;h[dd,dd]=1;h.diagonal().add_(.01*h.diag().mean());pm=torch.argsort(h.diag(),descending=True);ip=torch.argsort(pm);W=W[:,pm].clone();W[:,dd[pm]]=0;h=h[pm][:,pm];hi=torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)),upper=True);s=(cs*w.float().std(1)/cr).clamp_min(1e-10).half();sf=s.float();q=torch.zeros(r,c,dtype=torch.int8,device=W.device)
 for a in range(0,c,bs):
  b=min(a+bs,c);X=W[:,a:b].clone();hb=hi[a:b,a:b];er=torch.zeros_like(X)
  for j in range(b-a):v=X[:,j];d=hb[j,j];z=torch.clamp(torch.round(v/sf),-cr,cr);q[:,a+j]=z.to(torch.int8);e=(v-z*sf)/d;er[:,j]=e;X[:,j:]-=e[:,None]*hb[j,j:][None]
  if b<c:W[:,b:]-=er@hi[a:b,b:]
 return q[:,ip].cpu(),s.cpu()
def qm(sd,hh):
 o,mt={},{}
 for n,t in sd.items():
  t=t.detach().contiguous()
  if not t.is_floating_point()or t.numel()<=65536 or n not in hh:o[n]=t.cpu().half()if t.is_floating_point()else t.cpu();mt[n]='p'
  else:
   b,c=(H.embed_bits,H.embed_clip)if'te.'in n else(H.matrix_bits,H.matrix_clip);o[n+'.q'],o[n+'.s']=gq(t,hh[n].to(t.device),c,2**(b-1)-1);mt[n]=f'gptq{b}'
 return o,mt
def dq(o,mt,sd):
 r={}
 for n,t in sd.items():
  if mt.get(n,'p')=='p':r[n]=o[n].to(t.dtype);continue
  q,s=o[n+'.q'],o[n+'.s'];r[n]=(q.float()*s.float().view(-1,*[1]*(q.ndim-1))).to(t.dtype)
 return r
def bf(d,k=2):a=np.frombuffer(d,np.uint8);n=len(a);return b'BSHF'+bytes([k])+np.concatenate([a[i::k]for i in range(k)]).tobytes()
def bu(d):
 if d[:4]!=b'BSHF':return d
 k=d[4];a=np.frombuffer(d,np.uint8,offset=5);n=len(a);o=np.empty(n,np.uint8);p=0
 for i in range(k):l=n//k+(i<n%k);o[i::k]=a[p:p+l];p+=l
 return o.tobytes()
cp=lambda d:BR.compress(bf(d),quality=11)if H.comp=='brotli'and BR else lzma.compress(bf(d),preset=9)
dc=lambda d:bu(BR.decompress(d)if H.comp=='brotli'and BR else lzma.decompress(d))
def se(m,hh,code):
 cb=len(code.encode('utf-8'))
 if H.main:torch.save(m.state_dict(),H.model_path);lg(f"Serialized model: {os.path.getsize(H.model_path)} bytes");lg(f"Code size: {cb} bytes")
 o,mt=qm(m.state_dict(),hh);u=io.BytesIO();torch.save(dict(w=o,m=mt),u);d=cp(u.getvalue())
 if H.main:
  with open(H.quant_path,'wb')as f:f.write(d)
  lg(f"Serialized model quantized+{H.comp}: {len(d)} bytes");lg(f"Total submission size quantized+{H.comp}: {len(d)+cb} bytes");assert len(d)+cb<=16_000_000,'over the cap'
 H.world>1 and D.barrier()
def de(dv):
 m=GP().to(dv).bfloat16();fp(m);sd={k:v.cpu()for k,v in m.state_dict().items()}
 with open(H.quant_path,'rb')as f:st=torch.load(io.BytesIO(dc(f.read())),map_location='cpu')
 m.load_state_dict(dq(st['w'],st['m'],sd),strict=True);m.lp=H.num_loops>0;return m
def te(lb,fn,*a):torch.cuda.synchronize();t=Z.perf_counter();l,b=fn(*a);torch.cuda.synchronize();lg(f"{lb} val_loss:{l:.8f} val_bpb:{b:.8f} eval_time:{1e3*(Z.perf_counter()-t):.0f}ms");return l,b
def tr(V,dv):
 m=GP().to(dv).bfloat16();fp(m);cm=torch.compile(m,dynamic=False,fullgraph=True);dm=DP(cm,device_ids=[H.local],broadcast_buffers=False)if H.world>1 else cm;lg(f"model_params:{sum(p.numel()for p in m.parameters())}");op=OP(m);dl=DL(H.train_files,dv);mx=1e3*(H.max_wallclock_seconds-H.gptq_reserve_seconds)if H.max_wallclock_seconds>0 else None
 mx and lg(f"gptq:reserving {H.gptq_reserve_seconds:.0f}s, effective={mx:.0f}ms")
 pf=lambda i,t:i/max(H.iterations,1)if mx is None else t/max(mx,1e-9)
 lf=lambda f:1. if H.warmdown_frac<=0 or f<1-H.warmdown_frac else max((1-f)/H.warmdown_frac,H.min_lr)
 def st(i,c):
  op.zg();L=torch.zeros((),device=dv)
  for k in range(H.accum):
   if H.world>1:dm.require_backward_grad_sync=k==H.accum-1
   x,y=dl.nb(H.train_batch_tokens,H.accum)
   with torch.autocast('cuda',torch.bfloat16):l=dm(x,y)
   L+=l.detach();(l/H.accum).backward()
  f=min(i/H.muon_warmup_steps,1.)if H.muon_warmup_steps>0 else 1.
  if H.grad_clip>0:nn.utils.clip_grad_norm_(m.parameters(),H.grad_clip)
  op.go(c,(1-f)*H.muon_momentum_start+f*H.muon_momentum);return L/H.accum
 if H.warmup_steps>0:
  s0={k:v.detach().cpu().clone()for k,v in m.state_dict().items()};o0=[copy.deepcopy(o.state_dict())for o in op.a];m.train()
  for lp in(False,True)[:1+(H.num_loops>0)]:
   m.lp=lp
   for i in range(H.warmup_steps):st(i,1.);(i<6 or i+1==H.warmup_steps)and lg(f"{'loop_'if lp else''}warmup_step: {i+1}/{H.warmup_steps}")
  m.lp=False;m.load_state_dict(s0,strict=True);[o.load_state_dict(q)for o,q in zip(op.a,o0)];op.zg();dl=DL(H.train_files,dv)
 em={k:v.detach().float().clone()for k,v in m.state_dict().items()};sa,sn=None,0;ms=0.;sp=None;torch.cuda.synchronize();t0=Z.perf_counter();i=0
 while 1:
  la=i==H.iterations or sp is not None and i>=sp
  if la or H.val_loss_every>0 and i%H.val_loss_every==0:
   torch.cuda.synchronize();ms+=1e3*(Z.perf_counter()-t0);l,b=ev(V,cm,dv);lg(f"{i}/{H.iterations} val_loss: {l:.4f} val_bpb: {b:.4f}");torch.cuda.synchronize();t0=Z.perf_counter()
  if la:
   if sp is not None and i<H.iterations:lg(f"stopping_early: wallclock_cap train_time: {ms:.0f}ms step: {i}/{H.iterations}")
   break
  e=ms+1e3*(Z.perf_counter()-t0);f=pf(i,e)
  if H.num_loops>0 and not m.lp and f>=H.loop_at:m.lp=True;lg(f"layer_loop:enabled step:{i} frac:{f:.3f} encoder:{m.od[1][0]} decoder:{m.od[1][1]}")
  if H.qat_at>0 and not C.qa and f>=H.qat_at:C.qa=True;lg(f"qat:enabled step:{i} frac:{f:.3f}")
  L=st(i,c:=lf(f))
  with torch.no_grad():[em[k].mul_(H.ema_decay).add_(v.detach().float(),alpha=1-H.ema_decay)for k,v in m.state_dict().items()]
  if H.swa_frac>0 and c<H.swa_frac and i%H.swa_every<1:
   u={k:v.detach().cpu().float()for k,v in m.state_dict().items()};sa=u if sa is None else{k:sa[k]+v for k,v in u.items()};sn+=1
  i+=1;e=ms+1e3*(Z.perf_counter()-t0)
  if H.train_log_every>0 and(i<=5 or i%H.train_log_every==0):lg(f"{i}/{H.iterations} train_loss: {L.item():.4f} train_time: {e/6e4:.1f}m tok/s: {i*H.train_batch_tokens/(e/1e3):.0f}")
  r=mx is not None and e>=mx
  if H.world>1 and mx is not None:q=torch.tensor(int(r),device=dv);D.all_reduce(q,op=D.ReduceOp.MAX);r=bool(q.item())
  if sp is None and r:sp=i
 lg(f"peak memory allocated: {torch.cuda.max_memory_allocated()>>20} MiB");lg('ema:applying EMA weights');C.qa=False
 if sn:lg(f'swa:blending {sn} snapshots');em={k:.5*v+.5*sa[k].to(v.device)/sn for k,v in em.items()}
 m.load_state_dict({k:em[k].to(v.dtype)for k,v in m.state_dict().items()},strict=True);t1=Z.perf_counter();hh=hs(m,DL(H.train_files,dv),dv,H.gptq_calibration_batches);lg(f"GPTQ:collected {len(hh)} Hessians in {Z.perf_counter()-t1:.1f}s");return m,cm,hh
def main():
 code=P(__file__).read_text(encoding='utf-8');assert torch.cuda.is_available()and 8%H.world==0;dv=torch.device('cuda',H.local);torch.cuda.set_device(dv)
 if'RANK'in os.environ and'WORLD_SIZE'in os.environ:D.init_process_group('nccl',device_id=dv);D.barrier()
 torch.backends.cuda.matmul.allow_tf32=torch.backends.cudnn.allow_tf32=True;torch.set_float32_matmul_precision('high');[getattr(torch.backends.cuda,f'enable_{k}_sdp')(k in('flash','mem_efficient'))for k in('cudnn','flash','mem_efficient','math')];torch._dynamo.config.cache_size_limit=32;H.main and os.makedirs('logs',exist_ok=True);lg(code,False);lg('='*100,False);[lg(f'  {k}: {v}')for k,v in sorted(vars(H).items())if k[0]!='_'];lg(f'Running PyTorch {torch.__version__}',False)
 if H.sentry:lg(SP.run(['nvidia-smi'],stdout=SP.PIPE,text=True,check=False).stdout,False)
 R.seed(H.seed);np.random.seed(H.seed);torch.manual_seed(H.seed);torch.cuda.manual_seed_all(H.seed);V=VD(dv);lg(f"train_shards: {len(G.glob(H.train_files))}");lg(f"val_tokens: {V.v.numel()-1} val_bytes: {sum(int(by(V,z[:-1],z[1:]).sum())for i in range(0,V.v.numel()-1,1<<22)if(z:=V.v[i:i+(1<<22)+1].to(dv,torch.int64)).numel()>1)}")
 if not H.eval_only:m,cm,hh=tr(V,dv);torch._dynamo.reset();te('pre-quantization post-ema',ev,V,torch.compile(m,dynamic=False,fullgraph=True),dv);se(m,hh,code);del m,cm,hh
 m=de(dv);te('quantized',ev,V,torch.compile(m,dynamic=False,fullgraph=True),dv)
 if H.sliding_window:te('quantized_sliding_window',sw,V,m,dv)
 if H.ttt:del m;torch._dynamo.reset();torch.cuda.empty_cache();m=de(dv);te('quantized_ttt',tt,V,m,dv)
 if D.is_initialized():D.destroy_process_group()
if __name__=='__main__':main()
