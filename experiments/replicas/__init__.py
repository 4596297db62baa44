"""Groups of parties behind a balancer, simulated: what requests wait for, and who is started when."""
