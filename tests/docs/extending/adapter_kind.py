"""A VeRA adapter: its spec, plan and trained values, a training run, and an engine that answers as PEFT does."""

import sys
from pathlib import Path

from peft import get_peft_model

from graftwork.base import load as base_model
from graftwork.base.model_shape import ModelShape
from graftwork.planning.memory import RowSizes
from graftwork.training.planning.memory import predict_training
from graftwork.tuning.search_space import default_space
from tests import engines
from tests.docs.extending.common import check_served_as_peft, require_copy, small_task, train_and_fetch


def main(work: Path) -> None:
    require_copy(work)
    spec = small_task(work, adapter={"kind": "vera", "rank": 8}, quant={"kind": "none", "dtype": "float32"})
    base = base_model.resolve(spec.base)
    shape = ModelShape.from_config(base.config)
    model = engines.load_model(base.folder)
    attached = get_peft_model(model, spec.adapter.peft_config(model))
    trained = sum(parameter.numel() for parameter in attached.parameters() if parameter.requires_grad)
    assert spec.adapter.trained_params(shape) == trained, (spec.adapter.trained_params(shape), trained)
    plan = predict_training(spec, shape, RowSizes.at_most(spec.max_length), value_bytes=4)
    assert plan.part("trained weights") == 4 * trained, plan
    assert set(default_space(spec.adapter)) == {"optim.lr", "adapter.rank"}
    check_served_as_peft(spec, train_and_fetch(spec))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
