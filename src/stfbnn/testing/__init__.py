"""Proof that a posterior family is right: a suite of checks for the families of this library and for a user's own.

It needs no test framework, and works in any.
"""

from __future__ import annotations

from stfbnn.testing.contract import CLAUSES, Clause, ContractReport, check_family
from stfbnn.testing.setting import ContractError, Setting

__all__ = ["CLAUSES", "Clause", "ContractError", "ContractReport", "Setting", "check_family"]
