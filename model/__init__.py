"""The model and everything that the scripts share: stands on its own and imports none of them."""

from model.interrupts import answer_interrupts

answer_interrupts()  # before all other imports

from model.children import bound_spinning  # noqa: E402
from model.requirements import report_missing_libraries  # noqa: E402

bound_spinning()  # here, since it has to come before the first import of torch
report_missing_libraries()
