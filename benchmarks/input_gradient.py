"""What `Engine.input_term` is worth beside double backward, by the length of its shift.

A small plain supernet of RACL after twenty steps, 64 images of 16x16 pixels, float64. For the distributions and for the
weights: the cosine of both gradients, the ratio of their lengths, and by how much of itself R = mean ‖∇_x ℓ‖ of other
images changes when the parameters move by 0.1 against each. `python -m benchmarks.input_gradient`.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from rnas.attacks import PGD
from rnas.nas.engine import Engine, Halves
from rnas.nas.methods.racl import Racl, Settings
from rnas.nas.objectives import ImageCrossEntropy
from rnas.nets.supernet import Supernet
from rnas.settings import SearchSpace

SHIFTS = (1e-3, 1e-2, 1e-1, 3e-1, 1.0)
STEP = 0.1


def main() -> None:
    torch.manual_seed(0)
    method = Racl(Settings(out=Path(), space=SearchSpace(cells=3, channels=4, nodes=2)))
    net = Supernet(method.settings.space, 10)
    method.begin(net.shape)
    net.architecture = method
    net.double()
    engine = Engine(method, PGD(), Halves(None, None, 1, method.settings, torch.device("cpu")))
    engine.use(net)
    engine.begin(1)
    x, others, y = *torch.rand(2, 64, 3, 16, 16, dtype=torch.float64), torch.arange(64) % 10
    with torch.no_grad():
        for _ in range(40):  # BN's statistics settle
            net(x, method.weights())
    for _ in range(20):
        method.descend_weights(engine, x, y)
    noise = method.distributions.draw(engine.generator)

    def norm(images: Tensor, create_graph: bool = False) -> Tensor:
        net.eval()
        images = images.clone().requires_grad_()
        loss = F.cross_entropy(net(images, method.weights(*noise)), y, reduction="sum")
        return torch.autograd.grad(loss, images, create_graph=create_graph)[0].flatten(1).norm(dim=1).mean()

    for name, parameters in (("distributions", list(method.parameters())), ("weights", net.thetas)):

        def change(grads: tuple[Tensor, ...], parameters: list = parameters) -> float:
            before = norm(others).item()
            with engine.shifted(parameters, grads, -STEP / torch.nn.utils.get_total_norm(grads).item()):
                return norm(others).item() / before - 1

        exact = torch.autograd.grad(norm(x, True), parameters, allow_unused=True, materialize_grads=True)
        theirs = torch.cat([g.flatten() for g in exact])
        print(f"{name:13} double backward: R {change(exact):+.1%}", flush=True)
        for eps in SHIFTS:
            slope = engine.input_term(ImageCrossEntropy(), [(1.0, x)], y, parameters, noise, eps=eps)
            ours = torch.cat([g.flatten() for g in slope.grads])
            cosine, length = F.cosine_similarity(ours, theirs, dim=0), ours.norm() / theirs.norm()
            print(f"{name:13} eps {eps:<5g} cosine {cosine:.2f}, length {length:.2f}, R {change(slope.grads):+.1%}")


if __name__ == "__main__":
    main()
