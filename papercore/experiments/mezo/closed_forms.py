"""What follows from the paper's own tables and from arithmetic: memory, storage, time. Nothing here is trained.

Reported numbers come from `claims/mezo.csv`; what is computed from sizes alone comes from `papercore.mezo.memory`.
"""

from __future__ import annotations

from typing import Any

from papercore.lab.claims import reported_value
from papercore.lab.record import Record
from papercore.mezo.memory import (
    GIB,
    checkpoint_bytes,
    decoder_parameters,
    devices_needed,
    lora_parameters,
    memory_model,
    prefix_parameters,
)

OPT = {
    "1.3B": (24, 2048),
    "2.7B": (32, 2560),
    "6.7B": (32, 4096),
    "13B": (40, 5120),
    "30B": (48, 7168),
    "66B": (64, 9216),
    "175B": (96, 12288),
}
GPU_GIB = 80.0
MEMORY = "Table 22 (peak GPU memory, MultiRC ~400 tokens, bs 1/device)"
GPUS = "Table 22 (number of A100-80GB)"
FIGURE_4 = "Figure 4 (largest OPT that fits)"
SECONDS, SECONDS_GPUS = "Table 23 (wall-clock per step, MultiRC)", "Table 23 (GPUs)"
# Context and activations of one forward pass; the only free number of the memory model, the same for every size.
OVERHEAD_GIB = 2.0
MEZO_STEPS, FT_STEPS = 20_000, 625
TASKS = ("SST-2", "RTE", "CB", "BoolQ", "WSC", "WIC", "MultiRC", "COPA", "ReCoRD", "SQuAD", "DROP")


def cell(table: str, row: str, column: str) -> float:
    return reported_value("mezo", table, row, column)


def memory_rows() -> list[list[Any]]:
    """size, weights, closed form and reported GiB of MeZO, floor and reported GiB of full fine-tuning (None: not reported)."""
    rows: list[list[Any]] = []
    for size, (layers, width) in OPT.items():
        if size == "175B":
            continue
        weights = decoder_parameters(layers, width)
        gpus = cell(GPUS, f"OPT-{size}", "Zero-shot/MeZO")
        mezo = (memory_model(weights, "mezo") + gpus * OVERHEAD_GIB * GIB) / GIB
        floor = memory_model(weights, "adam") / GIB
        try:
            tuned: float | None = cell(MEMORY, f"OPT-{size}", "Full FT (Adam)")
        except KeyError:
            tuned = None
        rows.append([size, weights, gpus, mezo, cell(MEMORY, f"OPT-{size}", "Zero-shot/MeZO"), floor, tuned])
    return rows


def figure_4() -> list[list[Any]]:
    """GPUs, method, largest OPT by the closed form, the same as reported; MeZO and full fine-tuning."""
    rows: list[list[Any]] = []
    for gpus in (1, 2, 4, 8):
        for method, name in (("adam", "FT"), ("mezo", "Inference/MeZO")):
            fitting = "none"
            for size, (layers, width) in OPT.items():
                need = memory_model(decoder_parameters(layers, width), method)
                overhead = 0.0 if method == "adam" else OVERHEAD_GIB
                if devices_needed(need, device_gib=GPU_GIB, overhead_gib=overhead) <= gpus:
                    fitting = size
            reported = cell(FIGURE_4, f"{gpus}xA100", name)
            rows.append([gpus, name, fitting, f"{reported:g}B"])
    return rows


def storage_rows() -> list[list[Any]]:
    """What a fine-tuned OPT-66B takes beside its base, in bytes: method, closed form, reported MB (None: not reported)."""
    layers, width = OPT["66B"]
    lora, prefix = lora_parameters(layers, width), prefix_parameters(layers, width)
    return [
        ["all weights, fp16", checkpoint_bytes("adam", n_params=decoder_parameters(layers, width)), None],
        [
            "LoRA, rank 8",
            checkpoint_bytes("lora", trainable=lora),
            cell("text", "storage", "LoRA OPT-66B (19M params)"),
        ],
        [
            "prefix, 5 tokens",
            checkpoint_bytes("prefix", trainable=prefix),
            cell("text", "storage", "prefix OPT-66B (6M params)"),
        ],
        [
            "MeZO log, 20,000 steps, fp32 scalars",
            checkpoint_bytes("mezo", steps=MEZO_STEPS),
            cell("text", "storage", "MeZO OPT-66B log (20K steps x 2 B + seed)"),
        ],
        ["MeZO log, 100,000 steps (RoBERTa), fp32 scalars", checkpoint_bytes("mezo", steps=100_000), None],
    ]


def time_rows() -> list[list[Any]]:
    """size, seconds a step of MeZO and of fine-tuning, their GPUs, GPU-hours of a whole run of each, and the ratio."""
    rows: list[list[Any]] = []
    for size in ("1.3B", "2.7B", "13B", "30B", "66B"):
        mezo, mezo_gpus = (
            cell(SECONDS, "MeZO bsz16", f"OPT-{size}"),
            cell(SECONDS_GPUS, "MeZO bsz16", f"OPT-{size}"),
        )
        tuned, tuned_gpus = (
            cell(SECONDS, "FT bsz8 (FSDP)", f"OPT-{size}"),
            cell(SECONDS_GPUS, "FT bsz8 (FSDP)", f"OPT-{size}"),
        )
        hours, tuned_hours = mezo * mezo_gpus * MEZO_STEPS / 3600, tuned * tuned_gpus * FT_STEPS / 3600
        rows.append([size, mezo, mezo_gpus, tuned, tuned_gpus, hours, tuned_hours, hours / tuned_hours])
    return rows


def tasks_within_a_point(rows: tuple[str, ...]) -> int:
    """On how many of the 11 tasks of OPT-13B the best of `rows` is at most one point below fine-tuning (Table 1)."""
    table = "Table 1 (OPT-13B)"
    return sum(
        max(cell(table, row, task) for row in rows) >= cell(table, "FT (Adam)", task) - 1.0 for task in TASKS
    )


def record_all(record: Record) -> None:
    """Store the tables and the metrics that claims rest on; all exact."""
    memory, fits, time = memory_rows(), figure_4(), time_rows()
    record.table(
        "memory",
        ["size", "weights", "GPUs", "MeZO GiB, closed form", "MeZO reported", "FT GiB, floor", "FT reported"],
        memory,
    )
    record.table("figure_4", ["GPUs", "method", "closed form", "reported"], fits)
    record.table("storage", ["what is stored", "bytes", "reported MB"], storage_rows())
    record.table(
        "time",
        ["size", "MeZO s/step", "GPUs", "FT s/step", "GPUs of FT", "MeZO GPU-hours", "FT GPU-hours", "ratio"],
        time,
    )
    one_gpu = [row for row in memory if row[2] == 1]
    record.metric("memory_worst_gap_gib", max(abs(row[3] - row[4]) for row in one_gpu), "exact")
    record.metric(
        "table_ft_over_mezo_13b",
        cell(MEMORY, "OPT-13B", "Full FT (Adam)") / cell(MEMORY, "OPT-13B", "Zero-shot/MeZO"),
        "exact",
    )
    record.metric(
        "table_prefix_over_mezo_13b",
        cell(MEMORY, "OPT-13B", "Prefix FT") / cell(MEMORY, "OPT-13B", "Zero-shot/MeZO"),
        "exact",
    )
    layers, width = OPT["13B"]
    weights = decoder_parameters(layers, width)
    record.metric(
        "floor_ft_over_mezo_13b", memory_model(weights, "adam") / memory_model(weights, "mezo"), "exact"
    )
    record.metric("figure_4_matches", sum(row[2] == row[3] for row in fits), "exact")
    record.metric("figure_4_cells", len(fits), "exact")
    record.metric("step_speedup_30b", time[3][3] / time[3][1], "exact")
    record.metric("gpu_hours_ratio_30b", time[3][7], "exact")
    record.metric("sizes_where_gpu_hours_halve", sum(row[7] <= 0.55 for row in time), "exact")
    record.metric("log_megabytes_66b", checkpoint_bytes("mezo", steps=MEZO_STEPS) / 1e6, "exact")
    record.metric(
        "tasks_within_a_point_best", tasks_within_a_point(("MeZO", "MeZO (LoRA)", "MeZO (prefix)")), "exact"
    )
    record.metric("tasks_within_a_point_full", tasks_within_a_point(("MeZO",)), "exact")
