"""The published launch command, through the launcher, on stand-ins of its model and data."""

import json
import os
import subprocess
import sys

from tests.nlu.tiny import REPOSITORY, make_encoder, make_rows, write_rows

# The published flags; the schedule is cut to what 60 rows allow, and nothing else is changed.
PUBLISHED = """--model_name_or_path microsoft/deberta-v3-base --task_name mnli --apply_adalora --apply_lora
    --lora_type svd --target_rank 3 --lora_r 8 --reg_orth_coef 0.1 --init_warmup {init} --final_warmup {final}
    --mask_interval {mask} --beta1 0.85 --beta2 0.85
    --lora_module query,key,value,intermediate,layer.output,attention.output
    --lora_alpha 16 --do_train --do_eval --max_seq_length 256 --per_device_train_batch_size 32 --learning_rate 5e-4
    --num_train_epochs 7 --warmup_steps {warmup} --cls_dropout 0.15 --weight_decay 0 --evaluation_strategy steps
    --eval_steps {eval} --save_strategy steps --save_steps {save} --logging_steps {log} --seed 6
    --root_output_dir ./output/glue/mnli --overwrite_output_dir"""


def launch(folder, **schedule):
    flags = PUBLISHED.format(**schedule).split()
    launcher = ["-m", "torch.distributed.launch", "--master_port=8679", "--nproc_per_node=1"]
    environment = os.environ | {"GLUE_DIR": str(folder / "glue"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *launcher, str(REPOSITORY / "nlu" / "run_glue.py"), *flags],
        cwd=folder, env=environment, capture_output=True, text=True,
    )  # fmt: skip


def test_the_published_command_runs_and_is_lora2(tmp_path):
    make_encoder(tmp_path / "microsoft" / "deberta-v3-base", "deberta-v2")
    for seed, (split, count) in enumerate({"train": 60, "validation_matched": 10, "validation_mismatched": 8}.items()):
        rows = make_rows(("premise", "hypothesis"), False, count, seed, labels=3)
        write_rows(tmp_path / "glue" / "mnli" / f"{split}.jsonl", rows)

    result = launch(tmp_path, init=2, final=4, mask=2, warmup=2, eval=7, save=7, log=1)
    assert result.returncode == 0, result.stderr[-3000:]
    record = json.loads((tmp_path / "output/glue/mnli/results.json").read_text())
    assert (record["status"], record["method"], record["steps"]) == ("finished", "lora2", 14)
    assert {"accuracy", "accuracy_mm"} <= set(record["evaluations"][-1])
    assert record["live_budget"] == 12 * 3 and record["arguments"]["lora_k"] is None
    assert (tmp_path / "output/glue/mnli/adapter/adapter_config.json").is_file()

    refused = launch(tmp_path, init=8000, final=50000, mask=100, warmup=1000, eval=3000, save=30000, log=500)
    assert refused.returncode != 0  # the launcher reports the worker's exit code 2 as its own failure
    assert "8000 + 50000 = 58000" in refused.stderr and "the training has 14" in refused.stderr
    assert json.loads((tmp_path / "output/glue/mnli/results.json").read_text()) == record
