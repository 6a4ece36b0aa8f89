"""What a comparison says, in English and in Japanese."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

Language = Literal["en", "ja"]
LANGUAGES: tuple[Language, ...] = ("en", "ja")
Say = Callable[..., str]

TEXTS: dict[str, dict[Language, str]] = {
    "title": {"en": "{count} results compared", "ja": "{count} 件の結果の比較"},
    "outcome": {"en": "outcome", "ja": "結果"},
    "recipe": {"en": "recipe, where it differs", "ja": "レシピの相違点"},
    "kept": {"en": "kept of the expert's score", "ja": "専門モデルに対する保持率"},
    "kept_or_reference": {
        "en": "kept of the expert's or reference's score",
        "ja": "専門モデル・参照モデルに対する保持率",
    },
    "kept_of_reference": {"en": "kept of the reference's score", "ja": "参照モデルに対する保持率"},
    "scores": {"en": "score of the merged model", "ja": "統合モデルのスコア"},
    "scores_of_models": {"en": "score", "ja": "スコア"},
    "score_of": {"en": "{task} ({metric})", "ja": "{task}（{metric}）"},
    "cost": {"en": "cost", "ja": "コスト"},
    "status": {"en": "status", "ja": "状態"},
    "method": {"en": "method", "ja": "統合手法"},
    "gates": {"en": "gates met", "ja": "満たした品質ゲート"},
    "gates_met": {"en": "{met} of {count}", "ja": "{count} 件中 {met} 件"},
    "mean": {"en": "mean", "ja": "平均"},
    "worst": {"en": "worst", "ja": "最低"},
    "time": {"en": "time", "ja": "所要時間"},
    "read": {"en": "read", "ja": "読み込み量"},
    "written": {"en": "written", "ja": "書き込み量"},
    "memory": {"en": "peak memory", "ja": "最大メモリ"},
    "stored": {"en": "stored", "ja": "保存容量"},
    "latency": {"en": "latency against the experts'", "ja": "専門モデルに対するレイテンシ比"},
    "latency_of_models": {
        "en": "latency against the experts' or references'",
        "ja": "専門モデル・参照モデルに対するレイテンシ比",
    },
    "seconds": {"en": "{count} s", "ja": "{count} 秒"},
    "between": {"en": "{value} ({low} to {high})", "ja": "{value}（{low}～{high}）"},
    "queued": {"en": "queued", "ja": "待機中"},
    "running": {"en": "running", "ja": "実行中"},
    "succeeded": {"en": "succeeded", "ja": "成功"},
    "rejected": {"en": "rejected", "ja": "不合格（品質ゲート未達）"},
    "failed": {"en": "failed", "ja": "失敗"},
    "cancelled": {"en": "cancelled", "ja": "取り消し"},
    "no_result": {
        "en": "No result yet, or none any more: {jobs}",
        "ja": "結果がまだないか、すでに削除されています：{jobs}",
    },
    "other_samples": {
        "en": "The jobs were measured on different labeled samples: their scores can't be held against each other",
        "ja": "評価に使ったラベル付きデータがジョブごとに異なるため、スコアを直接比較できません",
    },
    "other_bases": {"en": "The jobs start from different bases", "ja": "ジョブごとにベースモデルが異なります"},
    "legend": {
        "en": "✓ marks the best of a row. What stands in parentheses is a confidence interval; where two of them "
        "overlap, the jobs may not differ at all.",
        "ja": "✓ は各行で最も良い値です。かっこ内は信頼区間で、区間が重なる場合は実質的な差がない可能性があります。",
    },
    "metric_accuracy": {"en": "accuracy", "ja": "正解率"},
    "metric_balanced_accuracy": {"en": "balanced accuracy", "ja": "バランス正解率"},
    "metric_macro_f1": {"en": "macro F1", "ja": "マクロ F1"},
    "metric_auroc": {"en": "AUROC", "ja": "AUROC"},
    "metric_calibration_error": {"en": "calibration error", "ja": "期待較正誤差（ECE）"},
    "metric_pearson": {"en": "Pearson correlation", "ja": "ピアソン相関係数"},
    "metric_spearman": {"en": "Spearman correlation", "ja": "スピアマン順位相関係数"},
    "metric_mse": {"en": "mean squared error", "ja": "平均二乗誤差（MSE）"},
    "metric_entity_f1": {"en": "entity F1", "ja": "エンティティ単位の F1"},
    "metric_perplexity": {"en": "perplexity", "ja": "パープレキシティ"},
    "metric_rouge_l": {"en": "ROUGE-L", "ja": "ROUGE-L"},
    "metric_exact_match": {"en": "exact match", "ja": "完全一致率"},
    "metric_chrf": {"en": "chrF", "ja": "chrF"},
    "metric_recall_at_1": {"en": "recall at 1", "ja": "再現率@1"},
    "metric_recall_at_5": {"en": "recall at 5", "ja": "再現率@5"},
    "metric_recall_at_10": {"en": "recall at 10", "ja": "再現率@10"},
}


def speaker(language: Language) -> Say:
    """Says a text of ``TEXTS`` by its name, with the values that stand in its braces."""
    return partial(_say, language)


def _say(language: Language, name: str, **values: Any) -> str:
    return TEXTS[name][language].format(**values)
