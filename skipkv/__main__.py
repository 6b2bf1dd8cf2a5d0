"""python -m skipkv"""

import sys

from skipkv.cli import main

sys.exit(main())
