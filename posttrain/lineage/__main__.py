"""python -m posttrain.lineage"""

from posttrain.errors import exit_on_user_error
from posttrain.lineage.command import main

exit_on_user_error(main)
