"""Makes deprecation warnings raised from phi3v_dist errors, in every process that the tests start.

Note: Python imports this module by itself where its folder is in PYTHONPATH. PYTHONWARNINGS cannot say it, since it
takes only whole names of modules.
"""

import warnings

for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
    warnings.filterwarnings("error", category=category, module="phi3v_dist")
