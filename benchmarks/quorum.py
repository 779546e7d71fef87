from __future__ import annotations
import sys, time
from functools import partial
from replay import *
from churn import *
from nebula.federation.membership import deadline

def oracle(coming, missing, *, arrivals, max_stall, **_):
    if not arrivals: return None
    patience = min(arrivals)+max_stall
    return max([*arrivals, *(coming[c] for c in missing if coming[c] <= patience)])

def fixed(seconds, missing, *, arrivals, **_):
    return max(max(arrivals), min(arrivals)+seconds) if arrivals else None

MAX=300.
def rules(n, rounds=ROUNDS, **k):
    return Rules(members={c:1000 for c in n}, fragments=(FRAGMENT,), rounds=rounds, inner_steps=20, evaluate_every=10**9, quorum=1, max_stall=MAX, **k)

def go(trace, name):
    r = Replay(trace, rules(trace.lives))
    d = {"oracle": partial(oracle, r.coming), "adaptive": deadline, "30": partial(fixed,30.), "120":partial(fixed,120.),"max":partial(fixed,MAX),"all":partial(fixed,float("inf"))}[name]
    with waiting(d):
        return r.run()
if __name__=="__main__":
  for n,t in load().items():
    base=None
    out=[]
    t0=time.time()
    for k in ("oracle","adaptive","30","120","max","all"):
        R=go(t,k); T=R[-1].committed; m=sum(len(x.merge.arrivals) for x in R)
        if base is None: base=(T,m); out.append(f"{T:.0f}s {m}")
        else: out.append(f"{k}: time {100*(T/base[0]-1):+.2f}% idle {100*sum(x.idle for x in R)/base[0]:.2f}% drop {100*sum(x.dropped for x in R)/base[1]:.2f}% tps {100*(m/T/(base[1]/base[0])-1):+.2f}%")
    print(f"{n:14s}", " | ".join(out), f"{time.time()-t0:.1f}", flush=True)
