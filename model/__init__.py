"""The model and everything that the scripts share: stands on its own and imports none of them."""

from model.children import bound_spinning
from model.interrupts import answer_interrupts
from model.requirements import report_missing_libraries

bound_spinning()  # here, since it has to come before the first import of torch
report_missing_libraries()
answer_interrupts()
