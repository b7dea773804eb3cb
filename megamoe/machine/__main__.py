"""`python -m megamoe.machine`"""

import sys

from megamoe.machine.debug import main

sys.exit(main())
