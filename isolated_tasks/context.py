"""What code keeps around a task: taken along from the slot, put in place around the body.

(Being written.)
"""
