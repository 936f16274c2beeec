"""Unconditional flow models: stock diffusers networks with a FlowMatchEulerDiscreteScheduler, loaded, checked, made and trained.

What inverse_noise_correction.py checks of its networks is here too; its samplers and its loss stand in that file.
"""

import copy
import hashlib
import json
import math
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from common import InputError, derived_seed

FLOW_NETWORKS = {"unet": "UNet2DModel", "transformer": "DiTTransformer2DModel"}  # folder: class


class Flow:
    """A network whose output is the velocity, and its scheduler; shape: of a picture, (channels, height, width)."""

    def __init__(self, network, scheduler, device):
        self.network, self.scheduler, self.device = network.to(device).eval(), scheduler, device
        self.shape = (network.config.in_channels, network.config.sample_size, network.config.sample_size)

    @classmethod
    def new(cls, spec, shape, device):
        """With random weights, see new_network."""
        from diffusers import FlowMatchEulerDiscreteScheduler

        return cls(new_network(spec, shape[1], shape[0], shape[0]), FlowMatchEulerDiscreteScheduler(), device)

    @classmethod
    def load(cls, folder, device):
        """The model in the folder, frozen, in float32; InputError if it cannot be loaded."""
        import diffusers

        diffusers.utils.logging.set_verbosity_error()
        diffusers.utils.logging.disable_progress_bar()
        try:
            part = next(name for name in FLOW_NETWORKS if (Path(folder) / name).is_dir())
            network = getattr(diffusers, FLOW_NETWORKS[part]).from_pretrained(folder, subfolder=part, dtype=torch.float32)
            scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(folder, subfolder="scheduler")
        except Exception as error:  # a broken folder makes the loaders raise many kinds
            raise InputError(f"--model {folder}: cannot be loaded ({error})") from None
        return cls(network.requires_grad_(False), scheduler, device)

    def velocity(self, x, sigma):
        """v(x, sigma). x: (batch, ...), sigma: (batch,) from 1 (noise) to 0 (picture)."""
        if not len(x):  # no picture of a batch could be inverted; a transformer cannot take none
            return x
        return predict(self.network, x, sigma * self.scheduler.config.num_train_timesteps)

    def grid(self, steps, power):
        """The scheduler's levels (steps + 1,) for sigma_k = (1 - k / steps)^power, as the Flux pipelines ask for theirs."""
        self.scheduler.set_timesteps(sigmas=[(k / steps) ** power for k in range(steps, 0, -1)])
        grid = self.scheduler.sigmas
        if grid[0] != 1 or grid[-1] != 0 or (grid.diff() >= 0).any():
            raise InputError(f"--model: its scheduler's levels do not fall from 1 to 0 ({grid.tolist()})")
        return grid.to(self.device)

    def save(self, folder):
        part = next(name for name, kind in FLOW_NETWORKS.items() if kind == type(self.network).__name__)
        self.network.save_pretrained(folder / part)
        self.scheduler.save_pretrained(folder / "scheduler")


# ---------------------------------------------------------------- networks


def new_network(spec, size, inputs, outputs, zero=False):
    """A stock network for size x size pictures. spec: "unet:24,48,48", a UNet2DModel with these channels and no attention, or
    "token:128,128,128", a DiTTransformer2DModel with one token of this width and as many layers, for very small pictures.
    zero: its output is 0 until it is trained."""
    import diffusers

    kind, widths = spec.split(":")[0], [int(width) for width in spec.split(":")[1].split(",")]
    shape = {"sample_size": size, "in_channels": inputs, "out_channels": outputs}
    if kind == "token":
        shape |= {"patch_size": size, "num_layers": len(widths), "attention_head_dim": widths[0], "num_attention_heads": 1}
        network = diffusers.DiTTransformer2DModel(**shape, num_embeds_ada_norm=1, norm_num_groups=1)
    else:
        blocks = {"down_block_types": ("DownBlock2D",) * len(widths), "up_block_types": ("UpBlock2D",) * len(widths)}
        shape |= {"block_out_channels": widths, "norm_num_groups": math.gcd(8, *widths), "add_attention": False}
        network = diffusers.UNet2DModel(**shape, **blocks, layers_per_block=1)
    if zero:
        for parameter in (network.proj_out_2 if kind == "token" else network.conv_out).parameters():
            torch.nn.init.zeros_(parameter)
    return network


def predict(network, x, t):
    """A stock network's output. x: (batch, channels, height, width), t: (batch,) from 1000 (noise) to 0."""
    classes = getattr(network.config, "num_embeds_ada_norm", None)  # of a transformer: its last class is "none"
    more = {} if classes is None else {"class_labels": torch.full((len(x),), classes, device=x.device)}
    return network(x, t, **more).sample


def asked_levels(steps, power):
    """What Flow.grid gives to scheduler.set_timesteps(sigmas=...), as Python source."""
    return f"[(k / {steps}){'' if power == 1 else f' ** {power!r}'} for k in range({steps}, 0, -1)]"


def model_hash(network):
    """SHA-256 of the weights, in float32, and their names."""
    digest = hashlib.sha256(type(network).__name__.encode())
    for name, value in sorted(network.state_dict().items()):
        digest.update(name.encode() + value.detach().cpu().float().contiguous().numpy().tobytes())
    return digest.hexdigest()


def count_flops(function):
    """Floating-point operations of function(), by torch's counter (attention in its plain form, which the counter knows)."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


# ---------------------------------------------------------------- training


def flow_loss(velocity, x, eps, sigma):
    """E |v(x_sigma, sigma) - (eps - x)|^2, x_sigma = (1 - sigma) x + sigma eps. x, eps: (batch, ...), sigma: (batch,)."""
    level = sigma.view(-1, *[1] * (x.dim() - 1))
    return (velocity((1 - level) * x + level * eps, sigma) - (eps - x)).square().mean()


def flow_objective(flow, pictures, batch):
    """loss(generator) of a flow on `batch` of the pictures (n, *shape), for fit."""

    def loss(generator):
        x = pictures[torch.randint(len(pictures), (batch,), generator=generator)].to(flow.device)
        eps = torch.randn(x.shape, generator=generator).to(flow.device)
        return flow_loss(flow.velocity, x, eps, torch.rand(batch, generator=generator).to(flow.device))

    return loss


def fit(network, loss, updates, lr, key, state, every):
    """AdamW (warm-up, cosine to 0) on loss(generator), whose draws all come from a generator seeded by key and the update alone.
    After every `every` updates and the last it yields their number, with the averaged weights in the network; they stay there
    at the end. state: a dict without "update", or one stored at a yield to go on from there; at every yield it is what is to be stored."""
    parameters = list(network.requires_grad_(True).parameters())
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    average = [p.detach().clone() for p in parameters]
    done, losses = state.get("update", 0), state.setdefault("losses", [])
    if done:
        network.load_state_dict(state["weights"])
    if 0 < done < updates:
        optimizer.load_state_dict(state["optimizer"])
        average = [p.to(parameters[0].device) for p in state["average"]]
    for i in tqdm(range(done, updates), desc=key[-1], leave=False, mininterval=1):
        optimizer.param_groups[0]["lr"] = lr * min(1, (i + 1) / 100) * 0.5 * (1 + math.cos(math.pi * i / updates))
        value = loss(torch.Generator().manual_seed(derived_seed(*key, i)))
        if not value.isfinite():
            raise InputError(f"{key[-1]}, update {i + 1}: loss {value.item()}; lower the learning rate {lr:g}")
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - min(0.999, (i + 1) / (i + 10)))
        losses.append(value.item())
        if (i + 1) % every == 0 or i + 1 == updates:
            weights = copy.deepcopy(network.state_dict())
            torch._foreach_copy_([p.data for p in parameters], average)
            state.update(update=i + 1, average=average, optimizer=optimizer.state_dict())
            if i + 1 == updates:  # a finished network needs a small checkpoint only
                weights = copy.deepcopy(network.state_dict())
                del state["average"], state["optimizer"]
            state["weights"] = weights
            yield i + 1
            network.load_state_dict(weights)
    network.eval().requires_grad_(False)


def update_flops(network, loss):
    """Of one loss(generator) and its gradient."""
    network.requires_grad_(True)
    flops = count_flops(lambda: loss(torch.Generator().manual_seed(0)).backward())
    network.zero_grad()
    return flops


# ---------------------------------------------------------------- checks


def check_flow(name):
    """The shape of the pictures of the flow in the folder `name`, from its configuration files; InputError if it is none."""
    configs = []
    folder = Path(name)
    part = next((part for part in FLOW_NETWORKS if (folder / part).is_dir()), None)
    if part is None:
        raise InputError(f"--model {name}: no such folder, or neither unet/ nor transformer/ in it")
    for file in (folder / part / "config.json", folder / "scheduler" / "scheduler_config.json"):
        try:
            configs.append(json.loads(file.read_text(encoding="utf-8")))
            kind = configs[-1].get("_class_name")
        except (OSError, ValueError, AttributeError):
            raise InputError(f"--model {name}: {file.relative_to(folder)} is missing or damaged") from None
        wanted = "FlowMatchEulerDiscreteScheduler" if file.parent.name == "scheduler" else FLOW_NETWORKS[part]
        if kind != wanted:
            raise InputError(f"--model {name}: {file.parent.name} is a {kind}; supported: {wanted}")
    network, scheduler = configs
    for setting in ("use_dynamic_shifting", "invert_sigmas", "stochastic_sampling"):
        if scheduler.get(setting):
            raise InputError(f"--model {name}: a scheduler with {setting} is not supported")
    if part == "unet" and (network.get("class_embed_type") or network.get("num_class_embeds")):
        raise InputError(f"--model {name}: wants a class with every picture; only unconditional models are supported")
    size, channels = network.get("sample_size"), network.get("in_channels")
    if not isinstance(size, int) or network.get("out_channels") not in (channels, None):
        raise InputError(f"--model {name}: needs square pictures (sample_size a number) and as many channels out as in")
    return channels, size, size


def read_settings(folder, network, scheduler):
    """corrector.json of a corrector's folder; InputError if there is none, or if it was learnt for another network, or for other levels
    than those of the scheduler, whose set_timesteps has been called."""
    if not (folder / "corrector.json").is_file():
        raise InputError(f"{folder}: holds no corrector (no corrector.json)")
    settings = json.loads((folder / "corrector.json").read_text(encoding="utf-8"))
    if model_hash(network) != settings["model_hash"]:
        raise InputError(f"{folder}: this corrector was learnt for another model; learn one for this model")
    given = scheduler.sigmas.tolist()
    levels = torch.tensor([sigma * scheduler.config.num_train_timesteps for sigma in given[:-1]])
    if given != settings["sigmas"] or not levels.allclose(torch.tensor(settings["timesteps"])):
        asked = asked_levels(settings["steps"], settings["grid_power"])
        raise InputError(
            f"{folder}: this corrector was learnt for the {settings['steps']} steps in corrector.json, the scheduler is set to "
            f"{len(given) - 1} others: call scheduler.set_timesteps(sigmas={asked}) first"
        )
    return settings


def check_networks(args, shape):
    """InputError unless the networks that the arguments of inverse_noise_correction.py ask for can be made for pictures of that shape."""
    check_network(args.corrector_network, shape[1], "--corrector_network")
    if args.train_base:
        check_network(args.base_network, shape[1], "--base_network")


def check_network(spec, size, flag):
    """InputError unless new_network can make this for size x size pictures."""
    kind, _, widths = spec.partition(":")
    widths = [int(width) if width.isdecimal() else 0 for width in widths.split(",")]
    if kind not in ("unet", "token") or any(not 4 <= width <= 4096 or width % 4 for width in widths):
        raise InputError(
            f"{flag} {spec}: give unet: or token: and numbers from 4 to 4096 that 4 divides, as in unet:32,64,64 or token:64,64"
        )
    if kind == "token" and len(set(widths)) > 1:
        raise InputError(f"{flag} {spec}: the layers of a token network have one width, as in token:64,64")
    if kind == "unet" and size % 2 ** (len(widths) - 1):
        raise InputError(f"{flag} {spec}: {len(widths)} levels need a size that {2 ** (len(widths) - 1)} divides")
