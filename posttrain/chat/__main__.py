"""python -m posttrain.chat"""

from posttrain.chat.command import main
from posttrain.errors import exit_on_user_error

exit_on_user_error(main)
