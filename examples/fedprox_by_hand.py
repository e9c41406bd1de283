"""Federated fine-tuning with FedProx, written out.

Three clients hold Python files that they don't share. In each round, every client that is drawn trains the same small
adapter on its own files, and the server averages what comes back. fedloom loads the documents, the model and the
adapter; the federation itself stands here in plain torch. It ends at the adapter of
`fedloom run tiny training.engine=reference`, to the bit.

Run it with `python examples/fedprox_by_hand.py`. Read `federate` first. Letters: B sequences, T tokens, P weights.
"""

import random

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad

from fedloom import load_recipe
from fedloom.adapters.adapted_model import AdaptedModel
from fedloom.adapters.adapter import Adapter
from fedloom.data.tokens import TokenBlocks, take_batch
from fedloom.experiment.building import load_adapted_model
from fedloom.experiment.preparation import prepare
from fedloom.monitoring.observer import Observer
from fedloom.recipe.recipe import Recipe
from fedloom.seeds import derive_seed
from fedloom.training.client_dropout import ClientDropout
from fedloom.training.dropout_masks import sequence_keys


def federate(recipe: Recipe) -> Adapter:
    """Return the adapter after the last round: FedProx on the server's side (arXiv 1812.06127, algorithm 2)."""
    prepared = prepare(recipe, Observer())
    model = load_adapted_model(recipe, prepared.source)
    clients = [client.train for client in prepared.clients]
    cohort_size = max(1, int(recipe.federation.fraction * len(clients) + 0.5))

    # The trained weights of all layers, one after another in one vector. So averaging adapters is plain arithmetic.
    global_P = model.weights_P.detach().clone()
    print(f"round 0: loss {evaluate(model, global_P, prepared.central):.4f} on files that nobody trains on")
    for round in range(1, recipe.federation.rounds + 1):
        # Every random choice comes from (seed, purpose, round, client), so nothing depends on what ran before it.
        generator = random.Random(derive_seed(recipe.seed, "sampling", round))
        cohort = sorted(generator.sample(range(len(clients)), cohort_size))

        # The clients, one after another. On real machines they work at once, and only `trained_P` travels.
        sum_P, examples = torch.zeros_like(global_P, dtype=torch.float64), 0
        for client in cohort:
            trained_P = train_client(model, global_P, clients[client], recipe, round, client)
            sum_P += len(clients[client]) * trained_P.double()
            examples += len(clients[client])

        # The new global adapter is the mean. A client with twice the documents counts twice.
        global_P = (sum_P / examples).float()
        print(f"round {round}: loss {evaluate(model, global_P, prepared.central):.4f}, trained by clients {cohort}")
    return Adapter(model.layout, global_P)


def train_client(
    model: AdaptedModel, global_P: Tensor, blocks: TokenBlocks, recipe: Recipe, round: int, client: int
) -> Tensor:
    """Return one client's weights after a round of minimising F(w) + μ/2 ‖w − w_global‖² on its own documents."""
    settings = recipe.training
    weights_P = model.weights_P  # the layers of the model see views of this vector, and of its gradient
    weights_P.data.copy_(global_P)
    optimizer = torch.optim.AdamW([weights_P], lr=settings.learning_rate, weight_decay=settings.weight_decay)
    order = torch.Generator().manual_seed(derive_seed(recipe.seed, "order", round, client))
    dropout_seed, step = derive_seed(recipe.seed, "dropout", round, client), 0
    model.model.train()
    for _ in range(settings.epochs):
        for rows in torch.randperm(len(blocks), generator=order).split(settings.batch_size):
            model.gradient_P.zero_()
            with ClientDropout(sequence_keys([dropout_seed], [step], [0], len(rows))[0], alone=True):
                loss_sum, tokens = token_loss(model, blocks, rows)
            (loss_sum / tokens).backward()  # the gradient of F
            # All that FedProx adds to FedAvg: the gradient of μ/2 ‖w − w_global‖², a pull back to where all began.
            model.gradient_P.add_(weights_P.detach() - global_P, alpha=settings.proximal_mu)
            optimizer.step()
            step += 1
    return weights_P.detach().clone()


@torch.no_grad()
def evaluate(model: AdaptedModel, weights_P: Tensor, held_out: TokenBlocks) -> float:
    """Return the mean loss of an adapter on held-out documents, in nats a token."""
    model.weights_P.data.copy_(weights_P)
    model.model.eval()
    batches = [token_loss(model, held_out, rows) for rows in torch.arange(len(held_out)).split(8)]
    return sum(float(loss_sum) for loss_sum, _ in batches) / sum(tokens for _, tokens in batches)


def token_loss(model: AdaptedModel, blocks: TokenBlocks, rows: Tensor) -> tuple[Tensor, int]:
    """Return the loss of some blocks, summed over their tokens, and how many tokens that are."""
    batch = take_batch(blocks, rows)
    logits_BTV = model.logits(batch.tokens_BT)
    # Position t predicts token t + 1, and the last position nothing. Labels of -100 are padding and don't count.
    targets_BT = pad(batch.labels_BT[:, 1:], (0, 1), value=-100)
    loss_sum = cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten(), reduction="sum")
    return loss_sum, int((targets_BT != -100).sum())


if __name__ == "__main__":
    adapter = federate(load_recipe("tiny", ["training.engine=reference"]))
    print(f"adapter: {adapter.layout.size:,} weights, sha256 {adapter.sha256()}")
