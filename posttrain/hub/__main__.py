"""python -m posttrain.hub"""

from posttrain.errors import exit_on_user_error
from posttrain.hub.push import main

exit_on_user_error(main)
