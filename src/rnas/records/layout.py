"""The name of every file in a run folder; `records.schema` says what the JSON files hold."""

SETTINGS, ENVIRONMENT, LOG = "settings.json", "environment.json", "log.jsonl"
"""What makes a run the run that it is; what it depends on besides; what happened, a JSON object a line."""
CHECKPOINT = "checkpoint.pt"
LOCK, WRITER = ".lock", ".writer.json"
"""The lock of a run folder, and who holds it. The lock stays: where it is removed, some network file systems let two
processes in."""

GENOTYPE, ALPHAS, STRENGTHS = "genotype.json", "alphas.npz", "strengths.npz"
"""Of a search: what it found, and the course of α and of how much there was of each operation."""
SEEDS = "seeds.json"
"""Of searches that differ in their seed alone: what they found, compared."""
WEIGHTS, META = "model.safetensors", "model.json"
"""Of a training: the weights, and how to build the network that they are for."""
MODEL = "model.onnx"
EVALUATION, MASKS, EXAMPLES = "evaluation.json", "masks.npz", "examples.npz"
"""Of an evaluation: its figures, the verdict on every image, and some images. One of other settings that lies beside it
is evaluation.NAME.json with masks.NAME.npz and examples.NAME.npz (`records.evaluations.Files`)."""
PARTIAL, VERDICTS = "evaluation.partial", "attacks.json"
"""The folder of an evaluation that is under way, and what is known in it of every image so far."""
DISTORTION, FEATURES = "distortion.json", "features.npz"
"""How far an attack moves the features of each layer, and feature maps to look at."""

REPORT = "report.html"
FITTED = "budget.json"
"""What was chosen, in the run's folder: timings differ from call to call, and a resumed run must stay the same run."""
THROUGHPUT = "throughput.json"
"""Of a plan: the speeds that its estimates go by."""
