"""The published launch command on stand-ins of its model and data."""

import json

from nlu.run_glue import main
from tests.nlu.tiny import make_encoder, make_rows, write_rows

# The published flags; what depends on the number of rows is to be filled in.
TEMPLATE = """--model_name_or_path microsoft/deberta-v3-base --task_name mnli --apply_adalora --apply_lora
    --lora_type svd --target_rank 3 --lora_r 8 --reg_orth_coef 0.1 --init_warmup {init} --final_warmup {final}
    --mask_interval {mask} --beta1 0.85 --beta2 0.85
    --lora_module query,key,value,intermediate,layer.output,attention.output
    --lora_alpha 16 --do_train --do_eval --max_seq_length 256 --per_device_train_batch_size 32 --learning_rate 5e-4
    --num_train_epochs 7 --warmup_steps {warmup} --cls_dropout 0.15 --weight_decay 0 --evaluation_strategy steps
    --eval_steps {eval} --save_strategy steps --save_steps {save} --logging_steps {log} --seed 6
    --root_output_dir ./output/glue/mnli --overwrite_output_dir"""
PUBLISHED = TEMPLATE.format(init=8000, final=50000, mask=100, warmup=1000, eval=3000, save=30000, log=500)


def test_the_published_command_runs_and_is_lora2(tmp_path, monkeypatch, capsys):
    """Its schedule is cut to what 60 rows allow, and nothing else is changed; uncut, it is refused."""
    make_encoder(tmp_path / "microsoft" / "deberta-v3-base", "deberta-v2")
    for seed, (split, count) in enumerate({"train": 60, "validation_matched": 10, "validation_mismatched": 8}.items()):
        rows = make_rows(("premise", "hypothesis"), False, count, seed, labels=3)
        write_rows(tmp_path / "glue" / "mnli" / f"{split}.jsonl", rows)

    monkeypatch.setenv("GLUE_DIR", str(tmp_path / "glue"))
    monkeypatch.chdir(tmp_path)
    flags = TEMPLATE.format(init=2, final=4, mask=2, warmup=2, eval=7, save=7, log=1).split()
    assert main(["--local-rank=0", *flags]) == 0  # as torch.distributed.launch starts it
    record = json.loads((tmp_path / "output/glue/mnli/results.json").read_text())
    assert (record["status"], record["method"], record["steps"]) == ("finished", "lora2", 14)
    assert "accuracy" in record["evaluations"][-1]
    assert record["live_budget"] == 12 * 3 and record["arguments"]["lora_k"] == 8
    assert (tmp_path / "output/glue/mnli/adapter/adapter_config.json").is_file()

    assert main(PUBLISHED.split()) == 2
    error = capsys.readouterr().err
    assert "8000 + 50000 = 58000" in error and "the training has 14" in error
    assert json.loads((tmp_path / "output/glue/mnli/results.json").read_text()) == record
