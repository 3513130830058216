"""The site's side. Only the list of mods knows of fedmerge, and the app runs as well without it."""

from __future__ import annotations

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from digits.task import accuracy, load_site, make_model, train
from fedmerge.interop.flower import fedmerge_delta

app = ClientApp(mods=[fedmerge_delta])


def _site(context: Context) -> tuple[int, int]:
    return int(context.node_config["partition-id"]), int(context.node_config["num-partitions"])


@app.train()
def train_round(message: Message, context: Context) -> Message:
    """Train the model in the message on this site's images."""
    model = make_model()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    images, labels, _, _ = load_site(*_site(context))
    epochs, lr = int(context.run_config["local-epochs"]), float(context.run_config["learning-rate"])
    loss = train(model, images, labels, epochs, lr)
    metrics = MetricRecord({"train-loss": loss, "num-examples": len(labels)})
    return Message(RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Score the model in the message on all ten digits."""
    model = make_model()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    _, _, images, labels = load_site(*_site(context))
    metrics = MetricRecord({"accuracy": accuracy(model, images, labels), "num-examples": len(labels)})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)
