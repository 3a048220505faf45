"""The audit: every declared symmetry acts on live weights, and the loss must not see it.

from lit_symopt.audit import audit
report = audit(module, batch)
print(report)
assert report.passed
"""

from lit_symopt.audit.laboratory import Limits
from lit_symopt.audit.report import AuditReport, LossFinding, UpdateFinding
from lit_symopt.audit.run import audit

__all__ = ["AuditReport", "Limits", "LossFinding", "UpdateFinding", "audit"]
