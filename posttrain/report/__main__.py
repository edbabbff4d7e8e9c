from posttrain.errors import exit_on_user_error
from posttrain.report import main

exit_on_user_error(main)
