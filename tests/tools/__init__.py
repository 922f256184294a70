"""What tests are made with: faults, hosts, servers and ranks; none of it is a test."""
