"""Two ranks whose batches run out one by one: run by `accelerate launch`; says what torch's Join came to."""

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.nn.parallel import DistributedDataParallel

import hf_amp
from hf_amp import AmpSession, AttachError
from tests.rank_end import leave_together

accelerator = Accelerator(mixed_precision="fp16", cpu=True)
before = accelerator.prepare(nn.Linear(4, 1))
session = hf_amp.attach(accelerator, init_scale=256.0)
model = nn.Linear(4, 1)
model, optimizer = accelerator.prepare(model, torch.optim.SGD(model.parameters(), 1e-2))
by_hand = DistributedDataParallel(nn.Linear(4, 1))
AmpSession.for_model(by_hand, torch.optim.SGD(by_hand.parameters(), 1e-2))
refused = 0
for joined in (lambda: Join([model]), model.join, by_hand.join, before.join):
    try:
        with joined():
            for _ in range(2 + accelerator.process_index):
                accelerator.backward(model(torch.ones(2, 4)).sum())
                optimizer.step()
    except AttachError:
        refused += 1
with accelerator.join_uneven_inputs([model], even_batches=True):
    accelerator.backward(model(torch.ones(2, 4)).sum())
    optimizer.step()
session.detach()
with Join([model]):
    for _ in range(2 + accelerator.process_index):
        model(torch.ones(2, 4)).sum().backward()
print(f"rank {accelerator.process_index}: {refused} refused, {session.scaler.applied_steps} applied", flush=True)
leave_together()
