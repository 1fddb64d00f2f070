"""Hooks into torch: each fails when torch changes the name, the signature or the behaviour."""

import torch

from graftwork.compat.torch import EachResult, fake_tensors, set_last_rates, storage_key


def test_fake_tensors_have_storages_of_their_size_and_no_memory() -> None:
    outside = torch.ones(4, 2)
    with fake_tensors():
        huge = torch.empty(2**20, 2**20, dtype=torch.float32)  # 4 TiB
        assert huge.untyped_storage().nbytes() == 2**42
        assert huge.device.type == "cpu"
        assert (torch.empty(3, 4) @ outside).shape == (3, 2), "tensors from outside take part"


def test_each_result_sees_the_forward_and_the_backward_pass() -> None:
    shapes: list[tuple[int, ...]] = []
    with fake_tensors(), EachResult(lambda tensor: shapes.append(tuple(tensor.shape))):
        weight = torch.empty(5, 7, requires_grad=True)
        values, places = torch.empty(3, 7).topk(2)  # two tensors in one result
        product = torch.nn.functional.linear(torch.empty(3, 7), weight)
        assert shapes[-1] == (3, 5)
        assert shapes.count((3, 2)) == 2
        assert values.shape == places.shape
        shapes.clear()
        product.sum().backward()
    assert (5, 7) in shapes, "the weight's gradient is an operation of the backward pass"


def test_the_key_of_a_storage_is_shared_by_its_views_alone() -> None:
    with fake_tensors():
        tensor, other = torch.empty(4, 4), torch.empty(4, 4)
        keys = {storage_key(one.untyped_storage()) for one in (tensor, tensor.t(), tensor[1:], tensor.detach())}
        assert len(keys) == 1
        assert storage_key(other.untyped_storage()) not in keys


def test_a_scheduler_reports_the_rates_that_were_set_until_its_next_step() -> None:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: 1 / (1 + done))
    set_last_rates(scheduler, [0.25])
    assert scheduler.get_last_lr() == [0.25]
    assert scheduler.state_dict()["_last_lr"] == [0.25], "a checkpoint holds the same"
    optimizer.step()
    scheduler.step()
    assert scheduler.get_last_lr() == [0.5]
