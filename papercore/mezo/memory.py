"""How much memory a way of adapting a language model takes, in closed form (figure 4, tables 22
and 23, section 2.1 of the paper).

Glossary
    n_params        trained and frozen weights of the model, tied ones once
    trainable       weights of an adapter that get gradients
    dtype_bytes     bytes of a weight that is only read: 2 for float16 and bfloat16
    state_bytes     bytes of each of the four numbers that Adam keeps for a weight it trains: the weight, its
                    gradient, m and v (float32)
    GiB             2^30 bytes; the paper's tables call it GB, and an "80GB" device has 80 of them

What the closed form leaves out: activations (small without a backward pass), copies that mixed precision
makes, buffers of sharded training. It reproduces the paper's single-device cells of MeZO to 0.6 GiB with an
overhead of 2 GiB a device, and is a floor of Adam's, which the paper measured 1.4 to 1.65 times higher.
"""

from __future__ import annotations

from papercore.mezo.arguments import check_choice, check_number, check_positive_integer

GIB = 2**30
METHODS = ("inference", "mezo", "adam", "prefix", "lora")


def memory_model(
    n_params: int,
    method: str,
    *,
    dtype_bytes: int = 2,
    state_bytes: int = 4,
    trainable: int = 0,
    activation_bytes: float = 0.0,
    overhead_bytes: float = 0.0,
    exact: bool = False,
) -> float:
    """Bytes that a method needs for a model of n_params weights.

    method: "inference" reads the weights; "mezo" the same, and with exact=True a copy of the trained ones
    (trainable, or all if 0); "adam" trains all weights with four numbers of state_bytes each; "lora" and
    "prefix" read the weights and do that for `trainable` of them. activation_bytes: what the backward pass
    keeps (methods with one) or the forward pass uses at once. overhead_bytes: what a device needs before any
    weight, about 2 GiB on CUDA. Raises ValueError or TypeError.

    >>> memory_model(30_000_000_000, "mezo") / 1e9, memory_model(30_000_000_000, "adam") / 1e9
    (60.0, 480.0)
    """
    n_params = check_positive_integer("n_params", n_params, zero=True)
    check_choice("method", method, METHODS)
    dtype_bytes = check_positive_integer("dtype_bytes", dtype_bytes)
    state_bytes = check_positive_integer("state_bytes", state_bytes)
    trainable = check_positive_integer("trainable", trainable, zero=True)
    total = check_number("activation_bytes", activation_bytes, least=0.0)
    total += check_number("overhead_bytes", overhead_bytes, least=0.0)
    if method == "adam":
        return total + 4.0 * state_bytes * n_params
    total += float(dtype_bytes) * n_params
    if method in ("lora", "prefix"):
        total += 4.0 * state_bytes * trainable
    elif method == "mezo":
        total += float(dtype_bytes) * trainable
        if exact:
            total += float(dtype_bytes) * (trainable or n_params)
    return total


def devices_needed(
    nbytes: float, *, device_gib: float = 80.0, overhead_gib: float = 0.0, power_of_two: bool = True
) -> int:
    """How many devices hold so many bytes; power_of_two rounds up as figure 4 of the paper does.

    >>> devices_needed(16 * 12_853_473_280), devices_needed(16 * 12_853_473_280, power_of_two=False)
    (4, 3)
    """
    room = (
        check_number("device_gib", device_gib, above=0.0)
        - check_number("overhead_gib", overhead_gib, least=0.0)
    ) * GIB
    if room <= 0:
        raise ValueError(f"overhead_gib={overhead_gib:g} leaves nothing of device_gib={device_gib:g}")
    count = max(1, -int(-check_number("nbytes", nbytes, least=0.0) // room))
    return 1 << (count - 1).bit_length() if power_of_two else count


def decoder_parameters(
    n_layer: int, d_model: int, *, vocab: int = 50272, positions: int = 2050, ffn: int = 4
) -> int:
    """Weights of an OPT-style decoder: tied embedding, learned positions, biases, two LayerNorms a layer and
    a last one.

    >>> decoder_parameters(24, 2048), decoder_parameters(64, 9216)
    (1315758080, 65719701504)
    """
    attention = 4 * (d_model * d_model + d_model)
    feed_forward = 2 * ffn * d_model * d_model + ffn * d_model + d_model
    norms = 2 * 2 * d_model
    return (vocab + positions) * d_model + n_layer * (attention + feed_forward + norms) + 2 * d_model


def lora_parameters(n_layer: int, d_model: int, r: int = 8, *, matrices: int = 2) -> int:
    """Weights of LoRA's A and B at rank r on `matrices` square matrices a layer (the paper: query and value).

    >>> lora_parameters(64, 9216)
    18874368
    """
    return n_layer * matrices * 2 * r * d_model


def prefix_parameters(n_layer: int, d_model: int, tokens: int = 5) -> int:
    """Weights of a prefix: a key and a value for each token and layer.

    >>> prefix_parameters(64, 9216)
    5898240
    """
    return n_layer * 2 * tokens * d_model


def checkpoint_bytes(
    method: str, *, n_params: int = 0, trainable: int = 0, steps: int = 0, n: int = 1, dtype_bytes: int = 2
) -> int:
    """Bytes that store a fine-tuned model beside its base: all weights, an adapter, or MeZO's scalars
    (section 2.1).

    method: "adam" (all weights), "lora", "prefix" (trainable ones), "mezo": the master seed and one float32 a
    draw.

    >>> checkpoint_bytes("mezo", steps=20_000), checkpoint_bytes("lora", trainable=lora_parameters(64, 9216))
    (80008, 37748736)
    """
    check_choice("method", method, ("adam", "lora", "prefix", "mezo"))
    if method == "mezo":
        return 8 + 4 * check_positive_integer("steps", steps, zero=True) * check_positive_integer("n", n)
    return dtype_bytes * (n_params if method == "adam" else trainable)
