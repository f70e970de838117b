"""How near `Engine.input_term` comes to double backward, by the length of its shift: a small plain supernet of RACL
after twenty steps, 64 images of 16x16 pixels. Prints cosine and ratio of lengths; `python -m benchmarks.input_gradient`."""

from pathlib import Path

import torch
import torch.nn.functional as F

from rnas.attacks import PGD
from rnas.nas.engine import Engine, Halves
from rnas.nas.methods.racl import Racl, Settings
from rnas.nas.objectives import ImageCrossEntropy
from rnas.nets.supernet import Supernet
from rnas.settings import SearchSpace

SHIFTS = (1e-6, 1e-3, 1e-2, 3e-2, 1e-1, 3e-1)


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
    x, y = torch.rand(64, 3, 16, 16, dtype=torch.float64), torch.arange(64) % 10
    with torch.no_grad():
        for _ in range(40):  # BN's statistics settle
            net(x, method.weights())
    for _ in range(20):
        method.descend_weights(engine, x, y)
    noise = method.distributions.draw(engine.generator)
    for name, parameters in (("distributions", list(method.parameters())), ("weights", net.thetas)):
        net.eval()
        images = x.clone().requires_grad_()
        loss = F.cross_entropy(net(images, method.weights(*noise)), y, reduction="sum")
        norm = torch.autograd.grad(loss, images, create_graph=True)[0].flatten(1).norm(dim=1).mean()
        exact = torch.autograd.grad(norm, parameters, allow_unused=True, materialize_grads=True)
        exact = torch.cat([g.flatten() for g in exact])
        for eps in SHIFTS:
            slope = engine.input_term(ImageCrossEntropy(), [(1.0, x)], y, parameters, noise, eps=eps)
            ours = torch.cat([g.flatten() for g in slope.grads])
            cosine, ratio = F.cosine_similarity(ours, exact, dim=0), ours.norm() / exact.norm()
            print(f"{name:13} eps {eps:<6g} cosine {cosine:.3f} length {ratio:.2f}", flush=True)


if __name__ == "__main__":
    main()
