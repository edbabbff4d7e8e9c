from posttrain.report import main
from posttrain.run import exit_on_user_error

exit_on_user_error(main)
