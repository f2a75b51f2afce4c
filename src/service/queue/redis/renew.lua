-- Another lease for who still has the job.
local held = hold(ARGV[3], ARGV[4], ARGV[5], ARGV[6], ARGV[7])
return held
