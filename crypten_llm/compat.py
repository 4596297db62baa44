"""Version trouble of torch and CrypTen, and nothing else.

Owns every patch and every import that depends on a release. Nothing else in the project asks for a version
or reaches into a private name of another package. Tested with torch 2.11 to 2.13 and CrypTen 0.4.1.
"""

import importlib
import logging
import sys
import warnings
from collections.abc import Callable
from typing import Any


def import_crypten() -> Any:
    """CrypTen, importable on current torch and without any of its insecure defaults.

    CrypTen 0.4.1 asks for ``torch.onnx._internal.registration``, which torch 2.9 moved. Its default provider
    (rank 0 makes every triple in the clear) is replaced by the trusted third party before anything can use it.
    """
    old = "torch.onnx._internal.registration"
    if "crypten" not in sys.modules and old not in sys.modules:
        try:
            importlib.import_module(old)
        except ImportError:
            sys.modules[old] = importlib.import_module("torch.onnx._internal.torchscript_exporter.registration")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        level = logging.root.level
        import crypten
        import crypten.mpc
        import crypten.nn

        logging.root.setLevel(level)
    # Its tensors on a GPU override torch's functions in a way that torch warns of, and follows.
    warnings.filterwarnings("ignore", message="Defining your `__torch_function__` as a plain method")
    if crypten.cfg.mpc.provider == "TFP":
        crypten.cfg.mpc.provider = "TTP"
    return crypten


def install_communicator(communicator_class: Any, instance: Any) -> None:
    """Makes ``crypten.communicator.get()`` answer with ``instance``; ``None`` removes it."""
    import crypten.communicator as comm

    communicator_class.instance = instance
    comm.DistributedCommunicator = communicator_class


def install_generators(ring_element: Callable, kbit_tensor: Callable, streams: dict[str, dict]) -> None:
    """Replaces CrypTen's random number functions wherever one of its modules imported them by name.

    Its own generator is MT19937 behind a 32-bit seed: a party that sees 624 outputs predicts the rest, and with
    it the other party's shares. streams: by CrypTen's names for them, and by device.
    """
    import crypten

    modules: dict[str, Any] = dict(sys.modules)
    for name, module in modules.items():
        if name.startswith("crypten.") and not name.startswith("crypten_llm"):
            if hasattr(module, "generate_random_ring_element"):
                module.generate_random_ring_element = ring_element
            if hasattr(module, "generate_kbit_random_tensor"):
                module.generate_kbit_random_tensor = kbit_tensor
    crypten.generators.update(streams)


def install_ttp_client(client: Any) -> None:
    """Makes ``TTPClient.get()`` answer with ``client``; ``None`` removes it."""
    from crypten.mpc.provider.ttp_provider import TTPClient

    TTPClient._TTPClient__instance = client


def install_provider(provider: Any) -> None:
    """Has CrypTen's protocols take correlations from ``provider``; ``None`` brings the trusted third party back."""
    import crypten.mpc
    from crypten.mpc.provider import TrustedThirdParty

    vars(crypten.mpc)["__SUPPORTED_PROVIDERS"]["TTP"] = provider or TrustedThirdParty()
