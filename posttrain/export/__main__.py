"""python -m posttrain.export"""

from posttrain.errors import exit_on_user_error
from posttrain.export.command import main

exit_on_user_error(main)
