"""Other people's scores: what breaks which rule where, with the evidence, and "cannot tell" where that is the truth."""

from fairway.audit.examine import audit
from fairway.audit.many import audit_all, submissions
from fairway.audit.verdict import Finding, Place, Report, Step, Verdict

__all__ = ["Finding", "Place", "Report", "Step", "Verdict", "audit", "audit_all", "submissions"]
