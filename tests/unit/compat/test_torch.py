"""Hook into torch: fails when torch changes the name, the signature or the behaviour."""

import torch

from graftwork.compat.torch import set_last_rates


def test_a_scheduler_reports_the_rates_that_were_set_until_its_next_step() -> None:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: 1 / (1 + done))
    set_last_rates(scheduler, [0.25])
    assert scheduler.get_last_lr() == [0.25]
    assert scheduler.state_dict()["_last_lr"] == [0.25], "a checkpoint holds the same"
    optimizer.step()
    scheduler.step()
    assert scheduler.get_last_lr() == [0.5]
