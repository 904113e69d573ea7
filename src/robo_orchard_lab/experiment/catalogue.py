"""What an experiment's file may name without further trust.

Whoever sends a file chooses among these classes and functions, and all of their arguments. So
only that is listed of which no argument, whatever it is, and no call that a run makes can

- run code that the file brings along, or that isn't listed or trusted itself,
- unpickle anything, or take archives apart,
- download anything, but the weights that torchvision's makers publish (from their host, with
  their digest),
- write anywhere but where a path of ours is held to the run's folder.

That leaves out, among others, `torch.load` and everything in `torch.utils`, but loaders, samplers
and datasets of datasets; torchvision's datasets that download or unpickle (MNIST, CIFAR10);
metrics that fetch networks or tokenizers (FID, LPIPS, BERTScore); what builds networks of several
processes. Who needs one of them trusts it by name, as in
``--trust torchvision.datasets.mnist:MNIST``.
"""

from __future__ import annotations

import difflib
import importlib.util
import os
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Self

from robo_orchard_core.utils.config import Trust
from robo_orchard_core.utils.config.errors import (
    ConfigError,
    ConfigFieldError,
    ConfigSyntaxError,
    describe,
    unknown_field,
)
from robo_orchard_core.utils.config.formats import Plain
from robo_orchard_core.utils.config.parts import PART_KEYS
from robo_orchard_lab.builtin_hooks import HOOK_MODULES

# --- catalogued names ------------------------------------------------------------------------
# The names of the catalogue: public module, where in it they are defined, what they are called.


OURS: dict[str, dict[str, str]] = {
    "robo_orchard_lab.pipeline.hooks": {
        module: f"{hook} {hook}Config" for hook, module in HOOK_MODULES.items()
    },
    "robo_orchard_lab.pipeline.sinks": {
        "jsonl": "JsonLinesSink JsonLinesSinkConfig",
        "log": "LogSink LogSinkConfig",
        "trackers": "TrackerSink TrackerSinkConfig",
    },
    "robo_orchard_lab.pipeline": {
        "batch_processor": "SupervisedProcessor",
    },
    "robo_orchard_lab.experiment.samples": {
        "": "MLP Spirals",
    },
}
"""By the module that they are imported from, the module in it that defines them (empty: itself)."""

TORCH: dict[str, dict[str, str]] = {
    "torch.optim": {
        "": "Adafactor Muon",
        "adadelta": "Adadelta",
        "adagrad": "Adagrad",
        "adam": "Adam",
        "adamax": "Adamax",
        "adamw": "AdamW",
        "asgd": "ASGD",
        "nadam": "NAdam",
        "radam": "RAdam",
        "rmsprop": "RMSprop",
        "rprop": "Rprop",
        "sgd": "SGD",
        "sparse_adam": "SparseAdam",
    },
    "torch.optim.lr_scheduler": {
        "": """
            ChainedScheduler ConstantLR CosineAnnealingLR CosineAnnealingWarmRestarts CyclicLR
            ExponentialLR LambdaLR LinearLR MultiStepLR MultiplicativeLR OneCycleLR PolynomialLR
            ReduceLROnPlateau SequentialLR StepLR
        """,
    },
    "torch.optim.swa_utils": {
        "": "SWALR",
    },
    "torch.nn": {
        "modules.activation": """
            CELU ELU GELU GLU Hardshrink Hardsigmoid Hardswish Hardtanh LeakyReLU LogSigmoid
            LogSoftmax Mish MultiheadAttention PReLU RReLU ReLU ReLU6 SELU SiLU Sigmoid Softmax
            Softmax2d Softmin Softplus Softshrink Softsign Tanh Tanhshrink Threshold
        """,
        "modules.adaptive": "AdaptiveLogSoftmaxWithLoss",
        "modules.batchnorm": "BatchNorm1d BatchNorm2d BatchNorm3d SyncBatchNorm",
        "modules.channelshuffle": "ChannelShuffle",
        "modules.container": "ModuleDict ModuleList Sequential",
        "modules.conv": "Conv1d Conv2d Conv3d ConvTranspose1d ConvTranspose2d ConvTranspose3d",
        "modules.distance": "CosineSimilarity PairwiseDistance",
        "modules.dropout": """
            AlphaDropout Dropout Dropout1d Dropout2d Dropout3d FeatureAlphaDropout
        """,
        "modules.flatten": "Flatten Unflatten",
        "modules.fold": "Fold Unfold",
        "modules.instancenorm": "InstanceNorm1d InstanceNorm2d InstanceNorm3d",
        "modules.linear": "Bilinear Identity Linear",
        "modules.loss": """
            BCELoss BCEWithLogitsLoss CTCLoss CosineEmbeddingLoss CrossEntropyLoss GaussianNLLLoss
            HingeEmbeddingLoss HuberLoss KLDivLoss L1Loss MSELoss MarginRankingLoss
            MultiLabelMarginLoss MultiLabelSoftMarginLoss MultiMarginLoss NLLLoss PoissonNLLLoss
            SmoothL1Loss SoftMarginLoss TripletMarginLoss TripletMarginWithDistanceLoss
        """,
        "modules.normalization": "GroupNorm LayerNorm LocalResponseNorm RMSNorm",
        "modules.padding": """
            CircularPad1d CircularPad2d CircularPad3d ConstantPad1d ConstantPad2d ConstantPad3d
            ReflectionPad1d ReflectionPad2d ReflectionPad3d ReplicationPad1d ReplicationPad2d
            ReplicationPad3d ZeroPad1d ZeroPad2d ZeroPad3d
        """,
        "modules.pixelshuffle": "PixelShuffle PixelUnshuffle",
        "modules.pooling": """
            AdaptiveAvgPool1d AdaptiveAvgPool2d AdaptiveAvgPool3d AdaptiveMaxPool1d
            AdaptiveMaxPool2d AdaptiveMaxPool3d AvgPool1d AvgPool2d AvgPool3d FractionalMaxPool2d
            FractionalMaxPool3d LPPool1d LPPool2d LPPool3d MaxPool1d MaxPool2d MaxPool3d MaxUnpool1d
            MaxUnpool2d MaxUnpool3d
        """,
        "modules.rnn": "GRU GRUCell LSTM LSTMCell RNN RNNCell",
        "modules.sparse": "Embedding EmbeddingBag",
        "modules.transformer": """
            Transformer TransformerDecoder TransformerDecoderLayer TransformerEncoder
            TransformerEncoderLayer
        """,
        "modules.upsampling": "Upsample UpsamplingBilinear2d UpsamplingNearest2d",
    },
    "torch.utils.data": {
        "dataloader": "DataLoader",
        "dataset": "ChainDataset ConcatDataset StackDataset Subset",
        "sampler": """
            BatchSampler RandomSampler SequentialSampler SubsetRandomSampler WeightedRandomSampler
        """,
    },
}

TORCHVISION: dict[str, dict[str, str]] = {
    "torchvision.models": {
        "alexnet": "alexnet",
        "convnext": "convnext_base convnext_large convnext_small convnext_tiny",
        "densenet": "densenet121 densenet161 densenet169 densenet201",
        "efficientnet": """
            efficientnet_b0 efficientnet_b1 efficientnet_b2 efficientnet_b3 efficientnet_b4
            efficientnet_b5 efficientnet_b6 efficientnet_b7 efficientnet_v2_l efficientnet_v2_m
            efficientnet_v2_s
        """,
        "googlenet": "googlenet",
        "inception": "inception_v3",
        "maxvit": "maxvit_t",
        "mnasnet": "mnasnet0_5 mnasnet0_75 mnasnet1_0 mnasnet1_3",
        "mobilenetv2": "mobilenet_v2",
        "mobilenetv3": "mobilenet_v3_large mobilenet_v3_small",
        "regnet": """
            regnet_x_16gf regnet_x_1_6gf regnet_x_32gf regnet_x_3_2gf regnet_x_400mf regnet_x_800mf
            regnet_x_8gf regnet_y_128gf regnet_y_16gf regnet_y_1_6gf regnet_y_32gf regnet_y_3_2gf
            regnet_y_400mf regnet_y_800mf regnet_y_8gf
        """,
        "resnet": """
            resnet101 resnet152 resnet18 resnet34 resnet50 resnext101_32x8d resnext101_64x4d
            resnext50_32x4d wide_resnet101_2 wide_resnet50_2
        """,
        "shufflenetv2": """
            shufflenet_v2_x0_5 shufflenet_v2_x1_0 shufflenet_v2_x1_5 shufflenet_v2_x2_0
        """,
        "squeezenet": "squeezenet1_0 squeezenet1_1",
        "swin_transformer": "swin_b swin_s swin_t swin_v2_b swin_v2_s swin_v2_t",
        "vgg": "vgg11 vgg11_bn vgg13 vgg13_bn vgg16 vgg16_bn vgg19 vgg19_bn",
        "vision_transformer": "vit_b_16 vit_b_32 vit_h_14 vit_l_16 vit_l_32",
    },
    "torchvision.models.detection": {
        "faster_rcnn": """
            fasterrcnn_mobilenet_v3_large_320_fpn fasterrcnn_mobilenet_v3_large_fpn
            fasterrcnn_resnet50_fpn fasterrcnn_resnet50_fpn_v2
        """,
        "fcos": "fcos_resnet50_fpn",
        "keypoint_rcnn": "keypointrcnn_resnet50_fpn",
        "mask_rcnn": "maskrcnn_resnet50_fpn maskrcnn_resnet50_fpn_v2",
        "retinanet": "retinanet_resnet50_fpn retinanet_resnet50_fpn_v2",
        "ssd": "ssd300_vgg16",
        "ssdlite": "ssdlite320_mobilenet_v3_large",
    },
    "torchvision.models.segmentation": {
        "deeplabv3": "deeplabv3_mobilenet_v3_large deeplabv3_resnet101 deeplabv3_resnet50",
        "fcn": "fcn_resnet101 fcn_resnet50",
        "lraspp": "lraspp_mobilenet_v3_large",
    },
    "torchvision.models.video": {
        "mvit": "mvit_v1_b mvit_v2_s",
        "resnet": "mc3_18 r2plus1d_18 r3d_18",
        "s3d": "s3d",
        "swin_transformer": "swin3d_b swin3d_s swin3d_t",
    },
    "torchvision.models.optical_flow": {
        "raft": "raft_large raft_small",
    },
    "torchvision.transforms.v2": {
        "_augment": "CutMix JPEG MixUp RandomErasing",
        "_auto_augment": "AugMix AutoAugment RandAugment TrivialAugmentWide",
        "_color": """
            ColorJitter Grayscale RGB RandomAdjustSharpness RandomAutocontrast
            RandomChannelPermutation RandomEqualize RandomGrayscale RandomInvert
            RandomPhotometricDistort RandomPosterize RandomSolarize
        """,
        "_container": "Compose RandomApply RandomChoice RandomOrder",
        "_geometry": """
            CenterCrop ElasticTransform FiveCrop Pad RandomAffine RandomCrop RandomHorizontalFlip
            RandomIoUCrop RandomPerspective RandomResize RandomResizedCrop RandomRotation
            RandomShortestSize RandomVerticalFlip RandomZoomOut Resize ScaleJitter TenCrop
        """,
        "_meta": "ClampBoundingBoxes ClampKeyPoints ConvertBoundingBoxFormat SetClampingMode",
        "_misc": """
            ConvertImageDtype GaussianBlur GaussianNoise Identity Normalize SanitizeBoundingBoxes
            SanitizeKeyPoints ToDtype
        """,
        "_temporal": "UniformTemporalSubsample",
        "_type_conversion": "PILToTensor ToImage ToPILImage ToPureTensor",
    },
    "torchvision.datasets": {
        "_optical_flow": "FlyingChairs FlyingThings3D HD1K KittiFlow Sintel",
        "_stereo_matching": """
            CarlaStereo ETH3DStereo FallingThingsStereo InStereo2k Kitti2012Stereo Kitti2015Stereo
            SceneFlowStereo SintelStereo
        """,
        "coco": "CocoCaptions CocoDetection",
        "fakedata": "FakeData",
        "fer2013": "FER2013",
        "folder": "ImageFolder",
    },
}

TORCHMETRICS: dict[str, dict[str, str]] = {
    "torchmetrics": {
        "aggregation": "CatMetric MaxMetric MeanMetric MinMetric RunningMean RunningSum SumMetric",
        "collections": "MetricCollection",
    },
    "torchmetrics.classification": {
        "accuracy": "Accuracy BinaryAccuracy MulticlassAccuracy MultilabelAccuracy",
        "auroc": "AUROC BinaryAUROC MulticlassAUROC MultilabelAUROC",
        "average_precision": """
            AveragePrecision BinaryAveragePrecision MulticlassAveragePrecision
            MultilabelAveragePrecision
        """,
        "calibration_error": "BinaryCalibrationError CalibrationError MulticlassCalibrationError",
        "cohen_kappa": "BinaryCohenKappa CohenKappa MulticlassCohenKappa",
        "confusion_matrix": """
            BinaryConfusionMatrix ConfusionMatrix MulticlassConfusionMatrix
            MultilabelConfusionMatrix
        """,
        "eer": "BinaryEER EER MulticlassEER MultilabelEER",
        "exact_match": "ExactMatch MulticlassExactMatch MultilabelExactMatch",
        "f_beta": """
            BinaryF1Score BinaryFBetaScore F1Score FBetaScore MulticlassF1Score MulticlassFBetaScore
            MultilabelF1Score MultilabelFBetaScore
        """,
        "group_fairness": "BinaryFairness BinaryGroupStatRates",
        "hamming": """
            BinaryHammingDistance HammingDistance MulticlassHammingDistance
            MultilabelHammingDistance
        """,
        "hinge": "BinaryHingeLoss HingeLoss MulticlassHingeLoss",
        "jaccard": "BinaryJaccardIndex JaccardIndex MulticlassJaccardIndex MultilabelJaccardIndex",
        "logauc": "BinaryLogAUC LogAUC MulticlassLogAUC MultilabelLogAUC",
        "matthews_corrcoef": """
            BinaryMatthewsCorrCoef MatthewsCorrCoef MulticlassMatthewsCorrCoef
            MultilabelMatthewsCorrCoef
        """,
        "negative_predictive_value": """
            BinaryNegativePredictiveValue MulticlassNegativePredictiveValue
            MultilabelNegativePredictiveValue NegativePredictiveValue
        """,
        "precision_fixed_recall": """
            BinaryPrecisionAtFixedRecall MulticlassPrecisionAtFixedRecall
            MultilabelPrecisionAtFixedRecall PrecisionAtFixedRecall
        """,
        "precision_recall": """
            BinaryPrecision BinaryRecall MulticlassPrecision MulticlassRecall MultilabelPrecision
            MultilabelRecall Precision Recall
        """,
        "precision_recall_curve": """
            BinaryPrecisionRecallCurve MulticlassPrecisionRecallCurve MultilabelPrecisionRecallCurve
            PrecisionRecallCurve
        """,
        "ranking": """
            MultilabelCoverageError MultilabelRankingAveragePrecision MultilabelRankingLoss
        """,
        "recall_fixed_precision": """
            BinaryRecallAtFixedPrecision MulticlassRecallAtFixedPrecision
            MultilabelRecallAtFixedPrecision RecallAtFixedPrecision
        """,
        "roc": "BinaryROC MulticlassROC MultilabelROC ROC",
        "sensitivity_specificity": """
            BinarySensitivityAtSpecificity MulticlassSensitivityAtSpecificity
            MultilabelSensitivityAtSpecificity SensitivityAtSpecificity
        """,
        "specificity": "BinarySpecificity MulticlassSpecificity MultilabelSpecificity Specificity",
        "specificity_sensitivity": """
            BinarySpecificityAtSensitivity MulticlassSpecificityAtSensitivity
            MultilabelSpecificityAtSensitivity SpecificityAtSensitivity
        """,
        "stat_scores": "BinaryStatScores MulticlassStatScores MultilabelStatScores StatScores",
    },
    "torchmetrics.regression": {
        "concordance": "ConcordanceCorrCoef",
        "cosine_similarity": "CosineSimilarity",
        "crps": "ContinuousRankedProbabilityScore",
        "csi": "CriticalSuccessIndex",
        "explained_variance": "ExplainedVariance",
        "js_divergence": "JensenShannonDivergence",
        "kendall": "KendallRankCorrCoef",
        "kl_divergence": "KLDivergence",
        "log_cosh": "LogCoshError",
        "log_mse": "MeanSquaredLogError",
        "mae": "MeanAbsoluteError",
        "mape": "MeanAbsolutePercentageError",
        "minkowski": "MinkowskiDistance",
        "mse": "MeanSquaredError",
        "nrmse": "NormalizedRootMeanSquaredError",
        "pearson": "PearsonCorrCoef",
        "r2": "R2Score",
        "rse": "RelativeSquaredError",
        "spearman": "SpearmanCorrCoef",
        "symmetric_mape": "SymmetricMeanAbsolutePercentageError",
        "tweedie_deviance": "TweedieDevianceScore",
        "wmape": "WeightedMeanAbsolutePercentageError",
    },
    "torchmetrics.clustering": {
        "adjusted_mutual_info_score": "AdjustedMutualInfoScore",
        "adjusted_rand_score": "AdjustedRandScore",
        "calinski_harabasz_score": "CalinskiHarabaszScore",
        "cluster_accuracy": "ClusterAccuracy",
        "davies_bouldin_score": "DaviesBouldinScore",
        "dunn_index": "DunnIndex",
        "fowlkes_mallows_index": "FowlkesMallowsIndex",
        "homogeneity_completeness_v_measure": "CompletenessScore HomogeneityScore VMeasureScore",
        "mutual_info_score": "MutualInfoScore",
        "normalized_mutual_info_score": "NormalizedMutualInfoScore",
        "rand_score": "RandScore",
    },
    "torchmetrics.nominal": {
        "cramers": "CramersV",
        "fleiss_kappa": "FleissKappa",
        "pearson": "PearsonsContingencyCoefficient",
        "theils_u": "TheilsU",
        "tschuprows": "TschuprowsT",
    },
    "torchmetrics.retrieval": {
        "auroc": "RetrievalAUROC",
        "average_precision": "RetrievalMAP",
        "fall_out": "RetrievalFallOut",
        "hit_rate": "RetrievalHitRate",
        "ndcg": "RetrievalNormalizedDCG",
        "precision": "RetrievalPrecision",
        "precision_recall_curve": "RetrievalPrecisionRecallCurve RetrievalRecallAtFixedPrecision",
        "r_precision": "RetrievalRPrecision",
        "recall": "RetrievalRecall",
        "reciprocal_rank": "RetrievalMRR",
    },
    "torchmetrics.segmentation": {
        "dice": "DiceScore",
        "generalized_dice": "GeneralizedDiceScore",
        "hausdorff_distance": "HausdorffDistance",
        "mean_iou": "MeanIoU",
    },
    "torchmetrics.wrappers": {
        "bootstrapping": "BootStrapper",
        "classwise": "ClasswiseWrapper",
        "minmax": "MinMaxMetric",
        "multioutput": "MultioutputWrapper",
        "multitask": "MultitaskWrapper",
        "running": "Running",
        "tracker": "MetricTracker",
    },
    "torchmetrics.image": {
        "d_lambda": "SpectralDistortionIndex",
        "d_s": "SpatialDistortionIndex",
        "ergas": "ErrorRelativeGlobalDimensionlessSynthesis",
        "psnr": "PeakSignalNoiseRatio",
        "psnrb": "PeakSignalNoiseRatioWithBlockedEffect",
        "qnr": "QualityWithNoReference",
        "rase": "RelativeAverageSpectralError",
        "rmse_sw": "RootMeanSquaredErrorUsingSlidingWindow",
        "sam": "SpectralAngleMapper",
        "scc": "SpatialCorrelationCoefficient",
        "ssim": "MultiScaleStructuralSimilarityIndexMeasure StructuralSimilarityIndexMeasure",
        "tv": "TotalVariation",
        "uqi": "UniversalImageQualityIndex",
        "vif": "VisualInformationFidelity",
    },
    "torchmetrics.text": {
        "bleu": "BLEUScore",
        "cer": "CharErrorRate",
        "chrf": "CHRFScore",
        "edit": "EditDistance",
        "eed": "ExtendedEditDistance",
        "mer": "MatchErrorRate",
        "perplexity": "Perplexity",
        "squad": "SQuAD",
        "ter": "TranslationEditRate",
        "wer": "WordErrorRate",
        "wil": "WordInfoLost",
        "wip": "WordInfoPreserved",
    },
    "torchmetrics.detection": {
        "ciou": "CompleteIntersectionOverUnion",
        "diou": "DistanceIntersectionOverUnion",
        "giou": "GeneralizedIntersectionOverUnion",
        "iou": "IntersectionOverUnion",
        "mean_ap": "MeanAveragePrecision",
        "panoptic_qualities": "ModifiedPanopticQuality PanopticQuality",
    },
    "torchmetrics.audio": {
        "sdr": """
            ScaleInvariantSignalDistortionRatio SignalDistortionRatio
            SourceAggregatedSignalDistortionRatio
        """,
        "snr": """
            ComplexScaleInvariantSignalNoiseRatio ScaleInvariantSignalNoiseRatio SignalNoiseRatio
        """,
    },
}

ALSO_IN_TORCHMETRICS = """
    AUROC Accuracy AveragePrecision BLEUScore BootStrapper CHRFScore CalibrationError
    CharErrorRate ClasswiseWrapper CohenKappa ConcordanceCorrCoef ConfusionMatrix CosineSimilarity
    CramersV CriticalSuccessIndex ErrorRelativeGlobalDimensionlessSynthesis ExactMatch
    ExplainedVariance ExtendedEditDistance F1Score FBetaScore FleissKappa HammingDistance
    HingeLoss JaccardIndex KLDivergence KendallRankCorrCoef LogAUC LogCoshError MatchErrorRate
    MatthewsCorrCoef MeanAbsoluteError MeanAbsolutePercentageError MeanSquaredError
    MeanSquaredLogError MetricTracker MinMaxMetric MinkowskiDistance ModifiedPanopticQuality
    MultiScaleStructuralSimilarityIndexMeasure MultioutputWrapper MultitaskWrapper
    NegativePredictiveValue NormalizedRootMeanSquaredError PanopticQuality PeakSignalNoiseRatio
    PearsonCorrCoef PearsonsContingencyCoefficient Perplexity Precision PrecisionAtFixedRecall
    PrecisionRecallCurve R2Score ROC Recall RecallAtFixedPrecision RelativeAverageSpectralError
    RelativeSquaredError RetrievalFallOut RetrievalHitRate RetrievalMAP RetrievalMRR
    RetrievalNormalizedDCG RetrievalPrecision RetrievalPrecisionRecallCurve RetrievalRPrecision
    RetrievalRecall RetrievalRecallAtFixedPrecision RootMeanSquaredErrorUsingSlidingWindow SQuAD
    ScaleInvariantSignalDistortionRatio ScaleInvariantSignalNoiseRatio SensitivityAtSpecificity
    SignalDistortionRatio SignalNoiseRatio SpearmanCorrCoef Specificity SpecificityAtSensitivity
    SpectralAngleMapper SpectralDistortionIndex StatScores StructuralSimilarityIndexMeasure
    SymmetricMeanAbsolutePercentageError TheilsU TotalVariation TranslationEditRate TschuprowsT
    TweedieDevianceScore UniversalImageQualityIndex WeightedMeanAbsolutePercentageError
    WordErrorRate WordInfoLost WordInfoPreserved
"""
"""Those that are imported from the package itself as well."""


def _definitions(table: Mapping[str, Mapping[str, str]]) -> Iterator[tuple[str, str, str]]:
    """Public module, name and definition of each entry."""
    for public, modules in table.items():
        for module, names in modules.items():
            defined_in = f"{public}.{module}" if module else public
            for name in names.split():
                yield public, name, f"{defined_in}:{name}"


def _catalogue() -> dict[str, str]:
    catalogue: dict[str, str] = {}
    for table in (OURS, TORCH, TORCHVISION, TORCHMETRICS):
        for public, name, definition in _definitions(table):
            if table is OURS:
                catalogue[name] = definition
            catalogue[f"{public}:{name}"] = catalogue[definition] = definition
            if table is TORCHMETRICS and name in _ALSO_IN_TORCHMETRICS:
                catalogue[f"torchmetrics:{name}"] = definition
    return catalogue


_ALSO_IN_TORCHMETRICS = frozenset(ALSO_IN_TORCHMETRICS.split())

CATALOGUE: dict[str, str] = _catalogue()
"""From each name that files may use for a class or function to the place where it is defined.

These are a short name (``StatsMonitor``, for ours alone), the name that people import it by
(``torch.optim:SGD``), and the place itself (``torch.optim.sgd:SGD``).
"""

DEFINITIONS = frozenset(CATALOGUE.values())
"""The places."""


_KINDS = {
    "robo_orchard_lab.pipeline.hooks": "hook",
    "robo_orchard_lab.pipeline.sinks": "sink",
    "robo_orchard_lab.pipeline": "batch processor",
    "robo_orchard_lab.experiment.samples:MLP": "module",
    "robo_orchard_lab.experiment.samples:Spirals": "dataset",
    "torch.optim": "optimizer",
    "torch.optim.lr_scheduler": "LR scheduler",
    "torch.optim.swa_utils": "LR scheduler",
    "torch.nn": "module",
    "torch.utils.data.dataloader": "loader",
    "torch.utils.data.dataset": "dataset",
    "torch.utils.data.sampler": "sampler",
    "torchvision": "module",
    "torchvision.datasets": "dataset",
    "torchmetrics": "module",  # each metric is one
}


def kind_of(definition: str) -> str | None:
    """What an entry of the catalogue is, or makes; None for other code.

    >>> kind_of("torch.optim.sgd:SGD"), kind_of("torchvision.models.resnet:resnet18")
    ('optimizer', 'module')
    """
    if definition not in DEFINITIONS:
        return None
    place = definition
    while place not in _KINDS:
        place = place.rpartition(":" if ":" in place else ".")[0]
    return _KINDS[place]


def named(reference: str) -> str:
    """The place where it is defined; the reference itself where the catalogue doesn't have it.

    >>> named("StatsMonitor")
    'robo_orchard_lab.pipeline.hooks.stats_monitor:StatsMonitor'
    >>> named("torch.optim:SGD"), named("my_team.models:Net")
    ('torch.optim.sgd:SGD', 'my_team.models:Net')
    """
    return CATALOGUE.get(reference, reference)


def suggest(reference: str) -> str | None:
    """The name in the catalogue that is most like a reference, where one is very like it.

    >>> suggest("StatMonitor"), suggest("torch.optim:SDG"), suggest("AdmW"), suggest("os:system")
    ('StatsMonitor', 'torch.optim:SGD', 'torch.optim:AdamW', None)
    """
    # Without a module, whatever a module of the catalogue has under such a name.
    known = CATALOGUE if ":" in reference else _PUBLIC
    near = difflib.get_close_matches(reference, known, n=1, cutoff=0.85)
    return (near[0] if ":" in reference else _PUBLIC[near[0]]) if near else None


_PUBLIC = {name.rpartition(":")[2]: name for name in reversed(CATALOGUE)}


def with_definitions(value: Plain, path: tuple[str | int, ...] = ()) -> Plain:
    """The value with the places where code is defined for the other names that it has.

    Args:
        value: Of a document.
        path: Where it is there; only ``class_type``, ``func`` and ``config_type`` hold short names.
    """
    if isinstance(value, dict):
        return {key: with_definitions(item, (*path, key)) for key, item in value.items()}
    if isinstance(value, list):
        return [with_definitions(item, (*path, index)) for index, item in enumerate(value)]
    if isinstance(value, str) and (":" in value or (path and path[-1] in PART_KEYS)):
        return named(value)
    return value


TABLE = "tool.robo_orchard_lab"


@dataclass(frozen=True)
class ExperimentTrust:
    """What the user trusts beside the catalogue.

    >>> ExperimentTrust(("my_team.models",)).trust.covers("my_team.models.resnet", "ResNet")
    True

    Attributes:
        names: Packages, modules (``my_team.models``) and single classes or functions
            (``my_team.models:Net``).

    Raises:
        ConfigError: One is written as neither.
    """

    names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _ = self.trust

    @classmethod
    def of(cls, names: str | type | Iterable[str | type] = (), *, pyproject: bool = True) -> Self:
        """What is named here, and what the user's pyproject.toml says.

        Raises:
            ConfigError: A name is written wrongly; or the pyproject.toml is, which is named.
        """
        given = [names] if isinstance(names, str | type) else names
        texts = [
            name if isinstance(name, str) else f"{name.__module__}:{name.__qualname__}"
            for name in given
        ]
        return cls(tuple(dict.fromkeys([*texts, *(trusted_by_pyproject() if pyproject else ())])))

    @cached_property
    def trust(self) -> Trust:
        """The catalogue and these names, and nothing else."""
        try:
            return Trust(packages=frozenset(), classes=DEFINITIONS).widened(*self.names)
        except ValueError as error:
            raise ConfigError(str(error)) from None

    def make_local_modules_importable(self) -> None:
        """Have Python find the trusted modules that are nowhere but in the current folder.

        The folder is put at the end of ``sys.path``, where nothing in it can stand for what is
        installed, and only if a trusted module is there that can't be found otherwise.
        """
        here = str(Path.cwd())
        for name in self.names:
            top = name.partition(":")[0].partition(".")[0]
            if here in sys.path or _is_found(top):
                continue
            if PathFinder.find_spec(top, [here]) is not None:
                sys.path.append(here)


def _is_found(module: str) -> bool:
    try:
        return module in sys.modules or importlib.util.find_spec(module) is not None
    except ValueError:  # of a module that hides where it comes from
        return True


def trusted_by_pyproject(folder: Path | None = None) -> list[str]:
    """What the nearest pyproject.toml with our table trusts.

    Args:
        folder: Where to look, and above it up to the root of its git repository; outside of one,
            there alone. By default the current folder. Files above that are another user's don't
            count.

    Raises:
        ConfigError: It can't be read, or its table holds something else; the file is named.
    """
    for path in _pyprojects(Path.cwd() if folder is None else folder.absolute()):
        try:
            table = _table(path)
            if table is not None:
                return _names(table)
        except ConfigError as error:
            error.source = str(path)
            raise
    return []


def _pyprojects(folder: Path) -> Iterator[Path]:
    folders = [folder, *folder.parents]
    root = next((number for number, f in enumerate(folders) if (f / ".git").exists()), 0)
    for inside in folders[: root + 1]:
        file = inside / "pyproject.toml"
        if file.is_file() and (inside is folder or _is_own(file)):
            yield file


def _is_own(file: Path) -> bool:
    """Whether it is the user's or the system's: above a folder may be one that all can write to."""
    return sys.platform == "win32" or file.stat().st_uid in (os.geteuid(), 0)


def _table(path: Path) -> object:
    """Our table; None where there is none."""
    try:
        inside: object = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"can't be read: {error.strerror or error}") from error
    except ValueError as error:  # of UTF-8 or of TOML
        raise ConfigSyntaxError(f"broken TOML: {error}") from error
    for key in TABLE.split("."):
        inside = inside.get(key) if isinstance(inside, dict) else None
    return inside


def _names(table: object) -> list[str]:
    place = tuple(TABLE.split("."))
    if not isinstance(table, dict):
        raise ConfigFieldError(f"expected a table, found {describe(table)}", place)
    for key in table:
        if key != "trust":
            raise unknown_field(key, ["trust"], TABLE, place)
    names = table.get("trust", [])
    place = (*place, "trust")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ConfigFieldError(f"expected a list of names, found {describe(names)}", place)
    try:
        ExperimentTrust(tuple(names))
    except ConfigError as error:
        raise error.under(place) from None
    return names
