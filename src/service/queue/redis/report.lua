-- A word about a job goes to the managers only from who has it: fence and word are one step.
local id, sealed, passing = ARGV[3], ARGV[8], ARGV[9] == '1'
local held = hold(id, ARGV[4], ARGV[5], ARGV[6], ARGV[7])
-- Progress is worthless later: while no manager reads, it does not fill the memory.
if held ~= 0 and not (passing and redis.call('XLEN', REPORTS) > 10000) then
    redis.call('XADD', REPORTS, '*', 'm', sealed, 'j', id, 'n', ARGV[10])
end
return held
