"""LoRA files (Hu et al. 2021): loaded once beside the weights, switched by name and scale.

Keys in diffusers', peft's and kohya's formats are read, by diffusers' own converters. A LoRA of the text encoder acts
on prompts encoded while it is active: switch first, then encode.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from models.bundles.manifest import sha256
from models.diffusion.folder import listing, one_line, quiet_libraries
from models.errors import LoraError

logger = logging.getLogger(__name__)

UNET = "unet"


class LoraSet:
    """The LoRA files of one model and which of them act.

    Args:
        networks: the UNets that a file's "unet" keys go into (more than one where a bundle has an LCM student).
        encoders: text encoders by their prefix in the files' keys: "text_encoder", "text_encoder_2".
    """

    def __init__(self, networks: Sequence[Any] = (), encoders: Mapping[str, Any] | None = None) -> None:
        self._networks = tuple(networks)
        self._encoders = dict(encoders or {})
        self._modules_of: dict[str, list[Any]] = {}  # what each LoRA was loaded into
        self._layers: dict[int, tuple[Any, list[Any]]] = {}  # by id: a module and its LoRA layers, found once
        self.active: tuple[tuple[str, float], ...] = ()
        self.digests: dict[str, str] = {}  # sha256 of each LoRA's file

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._modules_of)

    def load(self, name: str, path: Path, networks: Sequence[Any] | None = None) -> None:
        """Load a file and leave it inactive.

        Args:
            networks: the UNets that it is made for; None: all of them.

        Raises:
            LoraError: the name is taken, or the file is unreadable or has keys that fit nothing in this model.
        """
        if name in self._modules_of:
            raise LoraError(f"two LoRA files are called {name!r}: give one another name with NAME={path}")
        if not path.is_file():
            raise LoraError(f"LoRA file {path} is missing")
        try:
            self.digests[name] = sha256(path)
            with quiet_libraries():
                self._modules_of[name] = self._inject(name, path, self._networks if networks is None else networks)
        except LoraError:
            raise
        except Exception as error:
            raise LoraError(f"LoRA file {path} does not fit this model: {one_line(error)}") from error
        self._activate(())

    def use(self, loras: Sequence[tuple[str, float]]) -> None:
        """Make exactly these (name, scale) act."""
        wanted = tuple(loras)
        if wanted != self.active:
            for name, _ in wanted:
                if name not in self._modules_of:
                    raise LoraError(f"LoRA {name!r} is not loaded; loaded are: {', '.join(self.names) or 'none'}")
            self._activate(wanted)

    def _activate(self, wanted: tuple[tuple[str, float], ...]) -> None:
        for module, layers in self._layers.values():
            mine = [(name, scale) for name, scale in wanted if any(module is other for other in self._modules_of[name])]
            for layer in layers:
                layer.enable_adapters(bool(mine))
                if mine:
                    layer.set_adapter([name for name, _ in mine])
                for name, scale in mine:
                    layer.set_scale(name, scale)
        self.active = wanted

    def _inject(self, name: str, path: Path, networks: Sequence[Any]) -> list[Any]:
        from diffusers.loaders.lora_pipeline import StableDiffusionLoraLoaderMixin, StableDiffusionXLLoraLoaderMixin

        xl = len(self._encoders) > 1
        loader: Any = StableDiffusionXLLoraLoaderMixin if xl else StableDiffusionLoraLoaderMixin
        config = self._networks[0].config if xl else None  # maps the block names of Stability's own SDXL code
        state, alphas, metadata = loader.lora_state_dict(str(path), unet_config=config, return_lora_metadata=True)
        strangers = [key for key in state if not key.startswith(tuple(f"{part}." for part in (UNET, *self._encoders)))]
        if strangers or not state:
            raise LoraError(f"LoRA file {path} has keys that fit nothing in this model: {listing(sorted(strangers))}")
        arguments = {"network_alphas": alphas, "adapter_name": name, "metadata": metadata, "low_cpu_mem_usage": True}
        filled = []
        for prefix, module in [*((UNET, network) for network in networks), *self._encoders.items()]:
            keys = sorted(key for key in state if key.startswith(f"{prefix}."))
            if not keys:
                continue
            if prefix == UNET:
                module.load_lora_adapter(dict(state), prefix=UNET, **arguments)
            else:
                loader.load_lora_into_text_encoder(dict(state), text_encoder=module, prefix=prefix, **arguments)
            module.eval()  # new layers come in training mode, in which a file's lora_dropout would act
            self._layers[id(module)] = module, _lora_layers(module)
            if sum(name in layer.scaling for layer in self._layers[id(module)][1]) < len(keys) / 2:  # two keys a layer
                raise LoraError(f"LoRA file {path} has keys that fit nothing in this model, among {listing(keys)}")
            filled.append(module)
        return filled


def fuse(network: Any, path: Path) -> None:
    """Add a file's weights to a UNet's own, for good and in the UNet's dtype.

    Raises:
        LoraError: the file is unreadable or does not fit the UNet.
    """
    LoraSet([network]).load("fused", path)
    with quiet_libraries():
        network.fuse_lora()
        network.unload_lora()


def _lora_layers(module: Any) -> list[Any]:
    from peft.tuners.lora import LoraLayer

    return [layer for layer in module.modules() if isinstance(layer, LoraLayer)]
