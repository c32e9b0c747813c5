"""Membership inference: what a released predictive, and a released posterior file, tell of who was in the training data."""

from stfbnn.privacy.artifact_features import ArtifactFeatures, artifact_features
from stfbnn.privacy.attacks import ShadowScores, membership_attacks
from stfbnn.privacy.figures import MembershipFigures, by_class, membership_figures
from stfbnn.privacy.lira import lira
from stfbnn.privacy.releases import RELEASES, Release, ReleaseData
from stfbnn.privacy.result import PrivacyStudy, ReleaseOutcome
from stfbnn.privacy.rmia import rmia
from stfbnn.privacy.study import privacy_study, threshold_privacy

__all__ = [
    "RELEASES",
    "ArtifactFeatures",
    "MembershipFigures",
    "PrivacyStudy",
    "Release",
    "ReleaseData",
    "ReleaseOutcome",
    "ShadowScores",
    "artifact_features",
    "by_class",
    "lira",
    "membership_attacks",
    "membership_figures",
    "privacy_study",
    "rmia",
    "threshold_privacy",
]
